"""LoRC: the best low-rank part of the error, how it is stored, and what it may stand beside."""

import pytest
import torch
from shapes import random_weight

from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.lorc import LoRC, low_rank
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.solvers import proxy_loss
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import ExportError, RecipeError
from frugallm.formats.compressed_tensors import decode_linear, encode_linear
from frugallm.formats.extras import LowRank
from frugallm.formats.packed_export import GPTQ as GPTQ_LAYOUT
from frugallm.formats.packed_export import write_packed
from frugallm.formats.quantized_tensor import LinearScheme, WeightScheme
from frugallm.models.in_memory import InMemory
from frugallm.progress import Progress


def moment(width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, width, generator=generator) * torch.logspace(-1, 1, width)
    return x.T @ x / 400


def test_no_other_product_of_that_rank_is_closer():
    error = random_weight(20, 32, 0)
    a, b = low_rank(error, 3)
    singular = torch.linalg.svdvals(error.double())
    left = (error - a @ b).double().square().sum()
    torch.testing.assert_close(left, singular[3:].square().sum(), rtol=1e-4, atol=0)


def test_weighted_it_is_the_output_that_is_closest():
    error, h = random_weight(20, 32, 1), moment(32)
    plain, weighted = low_rank(error, 3), low_rank(error, 3, torch.linalg.cholesky(h.double()))
    losses = [proxy_loss(error, a @ b, h) for a, b in (plain, weighted)]
    assert losses[1] < 0.9 * losses[0]
    best = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(h.double()))[3:].square().sum()
    assert losses[1] == pytest.approx(float(best), rel=1e-3)


def test_at_full_rank_the_weight_comes_back():
    weight = random_weight(12, 32, 2)
    step = LoRC(rank=64, factor_bits=16)
    stored = round_to_nearest(weight, WeightScheme(bits=3, extras=("low_rank",)))
    value = step.repair(weight, stored, {}).dequantize()
    assert (value - weight).abs().max() < 0.02 * (stored.dequantize() - weight).abs().max()


@pytest.mark.parametrize("bits", [8, 16])
def test_factors_are_stored_in_so_many_bits_and_read_back(bits):
    weight, scheme = random_weight(12, 32, 3), WeightScheme(bits=4, group_size=16, extras=("low_rank",))
    q = LoRC(rank=2, factor_bits=bits).repair(weight, round_to_nearest(weight, scheme), {})
    linear = LinearScheme(weights=scheme)
    stored = encode_linear("x", q, linear)
    thin = stored["x.weight_low_rank_a"].nbytes + stored["x.weight_low_rank_b"].nbytes
    assert thin == (12 + 32) * 2 * bits // 8
    back = decode_linear("x", stored, linear)
    assert torch.equal(back.dequantize(), q.dequantize())
    torch.testing.assert_close(back.rows(2, 5).dequantize(), q.dequantize()[2:5])


def test_eight_bit_factors_lose_little():
    error = random_weight(40, 64, 4)
    a, b = low_rank(error, 4)
    assert (LowRank.of(a, b, 8).apply(torch.zeros(40, 64)) - a @ b).norm() < 0.02 * (a @ b).norm()


@pytest.fixture(scope="module")
def model():
    return InMemory(random_model("tied"))


def test_alone_it_rounds_and_after_a_step_that_rounds_it_only_adds(model):
    alone = make_plan((LoRC(bits=3),), model)
    assert all(type(p.solver) is LoRC and p.scheme.weights.bits == 3 for p in alone.linears.values())
    after = make_plan((GPTQ(bits=4), LoRC(bits=3, only=("*.mlp.*",))), model)
    for name, plan in after.linears.items():
        assert type(plan.solver) is GPTQ and plan.scheme.weights.bits == 4
        assert plan.scheme.weights.extras == (("low_rank",) if ".mlp." in name else ())


def test_it_makes_up_for_what_another_step_has_lost(model, tmp_path):
    steps = [GPTQ(bits=2), LoRC(rank=4, weighted=True)]
    run = carry_out(job_for(model, steps, windows("tied")), tmp_path / "run")
    stored = run.place.stored(run.job)
    codes_alone = carry_out(job_for(model, steps[:1], windows("tied")), tmp_path / "alone")
    before = codes_alone.place.stored(codes_alone.job)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = model.tensor(name)
    assert (stored.tensor(name) - weight).norm() < (before.tensor(name) - weight).norm()


def test_what_is_rounded_again_afterwards_is_refused(model):
    with pytest.raises(RecipeError, match="makes up for the rounding"):
        make_plan((LoRC(), GPTQ(bits=4)), model)
    from frugallm.compress.prune.unstructured.wanda import Wanda

    with pytest.raises(RecipeError, match="fill the zeros"):
        make_plan((Wanda(), RTN(), LoRC()), model)


def test_other_layouts_refuse_it(model, tmp_path):
    from frugallm.formats.decoded import Decoded

    run = carry_out(job_for(model, [LoRC()], windows("tied")), tmp_path / "run")
    (run.folder / "manifest.json").write_text("{}")
    with pytest.raises(ExportError, match="codes and nothing beside them"):
        write_packed(Decoded(run.folder), tmp_path / "gptq", GPTQ_LAYOUT, Progress())
    assert not (tmp_path / "gptq").exists()
    decoded, name = Decoded(run.folder), "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(decoded.tensor(name), run.place.stored(run.job).tensor(name))
