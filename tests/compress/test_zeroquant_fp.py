"""ZeroQuant-FP: constraints on scales against their definition, and what it becomes beside other steps."""

import pytest
import torch
from shapes import moment, random_weight

from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.grids import fit, nearest_on, round_to_nearest
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.zeroquant_fp import ZeroQuantFP, below_the_largest
from frugallm.conformance.trial import random_model
from frugallm.formats.engines import loads_in_transformers
from frugallm.formats.quantized_tensor import WeightScheme
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe

REAL = WeightScheme(bits=4, grid="e2m1", group_size=16)


def test_with_m1_scales_are_the_next_powers_of_two():
    step = ZeroQuantFP(group_size=16)
    scheme = step.weights({"x": 64})
    weight, h = random_weight(9, 64, 0), moment(64, 300)
    q = step.solve(weight, scheme, {"second_moment": h})
    wanted = torch.exp2(torch.ceil(torch.log2(weight.view(9, 4, 16).abs().amax(-1).double() / 6)))
    assert torch.equal(q.scale.double(), wanted)
    assert not torch.equal(q.codes, nearest_on(q, weight).codes)  # by GPTQ, not to nearest


def test_in_groups_of_32_m1_is_mxfp4():
    scheme = ZeroQuantFP().weights({"x": 64, "y": 96})
    assert scheme == RTN(grid="mxfp4").weights({"x": 64, "y": 96})
    weight = random_weight(5, 64, 1)
    q = ZeroQuantFP().solve(weight, scheme, {"second_moment": torch.eye(64)})
    assert torch.equal(q.dequantize(), round_to_nearest(weight, scheme).dequantize())


def test_with_m2_scales_lie_at_powers_of_two_below_the_largest_of_their_row():
    weight = random_weight(11, 96, 2) * torch.logspace(-1.5, 0, 96)
    importance = torch.rand(96, generator=torch.Generator().manual_seed(0)) + 0.1
    real, _ = fit(weight, REAL)
    scale = below_the_largest(weight, real, REAL, importance)
    largest = real.float().amax(1, keepdim=True)
    ratio = torch.log2(largest.double() / scale.double())
    assert torch.equal(ratio, ratio.round()) and (ratio >= 0).all()
    assert torch.equal(scale.float().amax(1, keepdim=True), largest)
    exact = torch.log2(largest.double() / real.double())
    assert ((ratio - exact).abs() < 1).all() and (ratio > 1).any()

    def errors(chosen):
        q = nearest_on(
            round_to_nearest(weight, REAL).__class__(torch.zeros(11, 96), chosen, None, REAL), weight
        )
        return ((q.dequantize() - weight) ** 2 * importance).view(11, 6, 16).sum(-1)

    for other in (torch.floor(exact), torch.ceil(exact)):
        tried = (largest.double() * torch.exp2(-other)).bfloat16()
        assert (errors(scale) <= errors(tried) * (1 + 1e-5)).all()


def test_a_row_with_one_group_keeps_its_scale_with_m2():
    step = ZeroQuantFP(scales="m2", group_size=-1)
    scheme, weight, h = step.weights({"x": 64}), random_weight(7, 64, 3), moment(64, 300)
    real = ZeroQuantFP(scales="real", group_size=-1)
    a, b = (s.solve(weight, scheme, {"second_moment": h}) for s in (step, real))
    assert torch.equal(a.scale, b.scale) and torch.equal(a.codes, b.codes)


def plan_of(*steps):
    return make_plan(Recipe.parse(steps).steps, InMemory(random_model("tied")))


def scheme_of(plan):
    (scheme,) = {linear.scheme for linear in plan.linears.values()}
    return scheme


@pytest.mark.parametrize(
    ("steps", "label", "loads"),
    [
        (["zeroquant_fp"], "W4 g32 e2m1, scales powers of two, A8 e4m3 per token", True),
        (["zeroquant_fp:activation=static,scales=m2"], "W4 g32 e2m1, A8 e4m3 static", False),
        (["zeroquant_fp", "gptq:bits=4"], "W4 g32 symmetric, A8 e4m3 per token", True),
        (["zeroquant_fp:input=int8", "rtn:bits=8"], "W8 g32 symmetric, A8 per token", True),
        (["zeroquant_fp", "lorc"], "W4 g32 e2m1, scales powers of two + low_rank, A8 e4m3 per token", False),
    ],
)
def test_beside_other_steps(steps, label, loads):
    plan = plan_of(*steps)
    assert scheme_of(plan).label() == label
    assert loads_in_transformers(plan) == loads
