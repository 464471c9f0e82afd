"""HQQ against its equations, written out group by group in float64, and against its degenerate cases."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import random_weight

from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.hqq import HQQ
from frugallm.compress.quantize.smoothquant import SmoothQuant
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.formats.decoded import Decoded
from frugallm.formats.engines import engines_for, loads_in_transformers
from frugallm.formats.quantized_tensor import WeightScheme
from frugallm.models.in_memory import InMemory

FINE = {"scale_dtype": "float32", "symmetric": False}


def solve(weight, step, group=16, scale_dtype="float32"):
    scheme = step.weights({"x": weight.shape[1]}).model_copy(
        update={"group_size": group, "scale_dtype": scale_dtype}
    )
    return step.solve(weight, scheme, {})


def heavy_tailed(rows, width, seed=0):
    return random_weight(rows, width, seed) ** 3 * 0.1


def reference(w, bits, step):
    """One group ``w``, a list of floats: the equations of the module, number by number."""
    first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = min(*w, 0.0), max(*w, 0.0)
    s = (high - low) / (last - first)
    store = (
        (lambda z: float(torch.tensor(z).half()))
        if step.zero == "float"
        else (lambda z: float(min(max(round(z), first), last)))
    )
    z, beta, least = float(round(first - low / s)), step.beta, math.inf
    for _ in range(step.iterations + 1):
        q = [min(max(round(x / s + z), first), last) for x in w]
        error = [x - s * (c - z) for x, c in zip(w, q)]
        loss = sum(e * e for e in error)
        if loss < least:
            least, best = loss, [s * (c - z) for c in q]
        kept = []
        for x, e in zip(w, error):
            size = abs(e / s)
            shrunk = max(size - size ** (step.p - 1) / beta, 0) if size else 0.0
            kept.append(x - s * math.copysign(shrunk, e))
        if step.fit_scale:
            steps = [c - z for c in q]
            s = sum(k * d for k, d in zip(kept, steps)) / sum(d * d for d in steps)
        z = store(sum(c - k / s for c, k in zip(q, kept)) / len(w))
        beta *= step.kappa
    return best


@pytest.mark.parametrize("fit_scale", [True, False])
@pytest.mark.parametrize("zero", ["float", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_those_of_the_equations(bits, zero, fit_scale):
    step = HQQ(bits=bits, zero=zero, fit_scale=fit_scale, iterations=8)
    weight = heavy_tailed(12, 32, bits)
    ours = solve(weight, step).dequantize().double()
    theirs = torch.tensor(
        [reference(group, bits, step) for group in weight.double().view(-1, 16).tolist()]
    ).double()
    # A value on the boundary of two codes may fall to either side in float32, and its group then goes another way.
    apart = (ours.view(-1, 16) - theirs).abs().amax(1) > 1e-4 * weight.abs().max()
    assert apart.float().mean() <= 0.05
    if zero == "float" or fit_scale:
        start = solve(weight, HQQ(bits=bits, zero=zero, iterations=0)).dequantize()
        assert ((ours.float() - start).abs() > 1e-3).float().mean() > 0.2  # the iterations do something


@settings(max_examples=20, deadline=None)
@given(
    st.integers(2, 8), st.sampled_from([16, None]), st.sampled_from(["float", "integer"]), st.integers(0, 99)
)
def test_without_iterations_it_is_asymmetric_rounding(bits, group, zero, seed):
    weight = heavy_tailed(5, 48, seed)
    plain = round_to_nearest(weight, WeightScheme(bits=bits, group_size=group, **FINE))
    ours = solve(weight, HQQ(bits=bits, zero=zero, iterations=0), group)
    assert torch.equal(ours.scale, plain.scale) and torch.equal(ours.zero.to(torch.int8), plain.zero)
    assert ours.zero.dtype is (torch.float16 if zero == "float" else torch.int8)
    assert (ours.codes != plain.codes).float().mean() <= 0.01  # ties


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.sampled_from(["float", "integer"]), st.booleans(), st.integers(0, 99))
def test_more_iterations_never_raise_the_error(bits, zero, fit_scale, seed):
    weight, errors = heavy_tailed(4, 64, seed), []
    for iterations in (0, 1, 5, 20):
        step = HQQ(bits=bits, zero=zero, fit_scale=fit_scale, iterations=iterations)
        q = solve(weight, step, scale_dtype="bfloat16")
        errors.append((q.dequantize() - weight).view(4, 4, 16).square().sum(-1))
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-3) + 1e-12).all()


@pytest.mark.parametrize("zero", ["float", "integer"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.7, -3.0, 1e4])
def test_groups_without_spread_and_of_any_size_stay_finite(value, zero):
    weight = torch.full((2, 32), value)
    weight[1, ::2] *= 0.5
    found = solve(weight, HQQ(bits=4, zero=zero), scale_dtype="bfloat16").dequantize()
    assert found.isfinite().all()
    assert (found - weight).abs().max() <= abs(value) / 14


def test_pruned_weights_stay_zero_on_a_grid_of_float_zeros():
    weight = heavy_tailed(6, 48)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    weight[pruned] = 0
    scheme = HQQ(bits=3).weights({"x": 48}).model_copy(update={"group_size": 16})
    q = HQQ(bits=3).solve(weight, scheme, {"pruned": pruned})
    assert q.zero.dtype is torch.float16 and torch.equal(q.zero, q.zero.round())
    assert not q.dequantize()[pruned].any()
    again = q.with_zeros(pruned)
    assert again.codes.dtype is torch.int8 and torch.equal(again.codes, q.codes)
    free = HQQ(bits=3).solve(weight, scheme, {})
    assert free.dequantize()[pruned].any() and not torch.equal(free.zero, free.zero.round())


@pytest.fixture(scope="module")
def model():
    return InMemory(random_model("tied"))


def test_the_folder_holds_float_zeros_which_we_read_and_transformers_refuses(model, tmp_path):
    from transformers import AutoModelForCausalLM

    run = carry_out(job_for(model, [HQQ(bits=3)], None), tmp_path / "run")
    assert not loads_in_transformers(run.job.plan)
    assert any(r.seen == "no" and "float zero" in r.note for r in engines_for(run.job.plan))
    assert '"zero_dtype": "float16"' in (run.folder / "config.json").read_text()
    with pytest.raises(ValueError, match="zero_dtype"):
        AutoModelForCausalLM.from_pretrained(str(run.folder))
    shown, back = run.place.stored(run.job), Decoded(run.folder)
    assert set(back.names()) == set(shown.names())
    for name in shown.names():
        assert torch.equal(back.tensor(name).float(), shown.tensor(name)), name


def test_whole_zeros_are_compressed_tensors_own(model, tmp_path):
    run = carry_out(job_for(model, [HQQ(zero="integer")], None), tmp_path / "run")
    assert "zero_dtype" not in (run.folder / "config.json").read_text()
    assert run.tensors()["model.layers.0.mlp.up_proj.weight_zero_point"].dtype is torch.int32


def test_it_rounds_what_a_smoothing_step_has_scaled(model, tmp_path):
    steps = [SmoothQuant(activation="token"), HQQ(bits=8, group_size=-1)]
    assert {p.solver.name() for p in make_plan(steps, model).linears.values()} == {"hqq"}
    run = carry_out(job_for(model, steps, windows("tied")), tmp_path / "run")
    assert run.tensors()["model.layers.0.mlp.up_proj.weight_zero_point"].dtype is torch.float16
    back = Decoded(run.folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(back.tensor(name), run.place.stored(run.job).tensor(name))
