"""AWQ against its equations, written out in float64 on the inputs themselves instead of their second moment."""

import pytest
import torch
from shapes import random_weight

from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.awq import AWQ, best_scale, scales
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import fit, round_to_nearest
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.solvers import proxy_loss
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import RecipeError
from frugallm.formats.quantized_tensor import WeightScheme
from frugallm.models.in_memory import InMemory

WIDTH = 48


def uneven_inputs(seed=0, tokens=300):
    """Inputs of which a few channels are much larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.1 + 3 * torch.rand(WIDTH, generator=generator) ** 6
    mix = torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=generator)
    return (torch.randn(tokens, WIDTH, generator=generator) @ mix) * size


def moment_of(x):
    return x.T @ x / len(x)


def nearest(w, scheme):
    """Round to nearest in float64 on ranges from the group's extremes; scales as they are stored."""
    rows, width = w.shape
    values = w.double().view(rows, -1, scheme.columns_per_scale(width))
    scale, zero = fit(w.float(), scheme)
    s = scale.double()[..., None]
    z = torch.zeros_like(s) if zero is None else zero.double()[..., None]
    q = (torch.round(values / s) + z).clamp(*scheme.code_range)
    return (s * (q - z)).view(rows, width)


@pytest.mark.parametrize("duo", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_scale_is_the_one_that_leaves_the_output_closest(bits, symmetric, duo):
    scheme = WeightScheme(bits=bits, symmetric=symmetric, group_size=16, scale_dtype="float32")
    weight, x = random_weight(40, WIDTH, 1), uneven_inputs()
    magnitude = weight.double().abs().view(40, 3, 16)
    share = (magnitude / magnitude.amax(-1, keepdim=True)).mean(0).view(WIDTH)
    losses, wanted = [], [torch.ones(WIDTH, dtype=torch.float64)]
    for step in range(20):
        s = x.double().abs().mean(0) ** (step / 20)
        s = s / (share ** (1 - step / 20) + 1e-4) if duo else s
        wanted.append(s / (s.max() * s.min()).sqrt())
    for s in wanted:
        d = nearest(weight * s.float(), scheme) / s - weight
        losses.append(float((x.double() @ d.T).square().sum()))
    best = min(range(21), key=losses.__getitem__)
    assert best > 0 and losses[best] < 0.95 * losses[0]  # scaling helps here, so the test can fail
    tried = list(scales(weight, x.abs().mean(0), scheme, 20, duo=duo))
    torch.testing.assert_close(torch.stack(tried).double(), torch.stack(wanted), rtol=1e-5, atol=0)
    found = best_scale(weight, moment_of(x), scheme, tried)
    torch.testing.assert_close(found.double(), wanted[best], rtol=1e-5, atol=0)


def test_the_scale_loses_nothing_against_none():
    scheme = WeightScheme(bits=3, group_size=16)
    for seed in range(5):
        weight, h = random_weight(8, WIDTH, seed), moment_of(uneven_inputs(seed))
        s = best_scale(weight, h, scheme, scales(weight, torch.rand(WIDTH), scheme, 5, duo=True))
        scaled, plain = (round_to_nearest(weight * one, scheme).dequantize() / one for one in (s, 1.0))
        assert proxy_loss(weight, scaled, h) <= proxy_loss(weight, plain, h) * (1 + 1e-6)


def test_channels_that_never_come_keep_the_scale_finite():
    x = uneven_inputs(5)
    x[:, ::7] = 0
    weight, scheme = random_weight(8, WIDTH, 6), WeightScheme(bits=3, group_size=16)
    weight[:, 16:32] = 0
    for duo in (True, False):
        for scale in scales(weight, x.abs().mean(0), scheme, 20, duo=duo):
            assert scale.isfinite().all() and (scale > 0).all()


@pytest.fixture(scope="module")
def model():
    return InMemory(random_model("tied"))


def run(model, steps, out):
    return carry_out(job_for(model, steps, windows("tied")), out)


def test_without_scaling_and_clipping_it_is_rounding_to_nearest(model, tmp_path):
    ours = run(model, [AWQ(grid=1, duo=False, clip=False)], tmp_path / "awq").tensors()
    plain = run(model, [RTN()], tmp_path / "rtn").tensors()
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_every_kind_of_site_is_scaled_and_only_those_asked_for(model, tmp_path):
    before = run(model, [RTN()], tmp_path / "rtn").tensors()
    block = "model.layers.0."
    for sites, changed in ((("norm",), True), (("rows",), False), ((), False)):
        after = run(model, [AWQ(sites=sites, clip=False)], tmp_path / f"sites{len(sites)}{changed}").tensors()
        same = torch.equal(before[f"{block}input_layernorm.weight"], after[f"{block}input_layernorm.weight"])
        assert same is not changed
    after = run(model, [AWQ(only=("*.layers.1.*",), group_size=32)], tmp_path / "one").tensors()
    assert torch.equal(before[f"{block}input_layernorm.weight"], after[f"{block}input_layernorm.weight"])
    after = run(model, [AWQ(only=("*.mlp.*",))], tmp_path / "mlp").tensors()
    assert torch.equal(before[f"{block}input_layernorm.weight"], after[f"{block}input_layernorm.weight"])
    name = f"{block}post_attention_layernorm.weight"
    assert not torch.equal(before[name], after[name])


def test_gptq_may_round_what_awq_has_scaled(model, tmp_path):
    steps = [AWQ(), GPTQ(bits=4)]
    plan = make_plan(steps, model)
    assert {p.solver.name() for p in plan.linears.values()} == {"gptq"}
    both = run(model, steps, tmp_path / "both")
    alone = run(model, [GPTQ(bits=4)], tmp_path / "alone")
    name = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(both.tensors()[name], alone.tensors()[name])


def test_scaling_after_rounding_and_scaling_twice_are_refused(model):
    with pytest.raises(RecipeError, match="awq after gptq: a smoothing step after rounding"):
        make_plan([GPTQ(), AWQ()], model)
    with pytest.raises(RecipeError, match="awq after awq: both scale the input of"):
        make_plan([AWQ(), AWQ(bits=3)], model)
