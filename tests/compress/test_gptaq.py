"""The column solve that makes up for moved inputs, against its equations in float64."""

import pytest
import torch
from shapes import random_weight

from frugallm.compress.quantize.gptaq import GPTAQ
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import fit
from frugallm.compress.quantize.solvers import compensate
from frugallm.formats.quantized_tensor import WeightScheme


def streams(width, tokens, moved=0.3, seed=0):
    """Inputs of the original model, and the same after something was done to them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * (
        0.05 + torch.rand(width, generator=generator) ** 3
    )
    original = torch.randn(tokens, width, generator=generator) @ mix
    change = torch.eye(width) + moved * torch.randn(width, width, generator=generator) / width**0.5
    return original, original @ change


def moments(original, x):
    return {"second_moment": x.T @ x / len(x), "cross_moment": (original - x).T @ x / len(x)}


def reference(weight, h, drift, scale, scheme, order):
    """Solve for the columns left at each step: what the error of a column, and the drift of its input, ask of them."""
    w, h, drift = weight.double().clone(), h.double(), drift.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    for place, j in enumerate(order):
        s = scale[:, j // scheme.columns_per_scale(len(h))].double()
        q = torch.round(w[:, j] / s).clamp(*scheme.code_range)
        codes[:, j] = q.to(torch.int8)
        rest = order[place + 1 :]
        wanted = torch.outer(w[:, j] - s * q, h[j, rest]) + torch.outer(w[:, j], drift[j, rest])
        w[:, rest] += torch.linalg.solve(h[rest][:, rest], wanted.T).T
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block_size", [16, 128])
def test_codes_are_those_of_the_equations(act_order, block_size):
    scheme = WeightScheme(bits=4, group_size=16)
    statistics = moments(*streams(64, 400))
    weight, (h, drift) = random_weight(48, 64, 3), statistics.values()
    scale, zero = fit(weight, scheme)
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(64)
    arguments = {"act_order": act_order, "block_size": block_size}
    ours = compensate(weight, h, scale, zero, scheme, drift=drift, **arguments).codes
    theirs = reference(weight, h, drift, scale, scheme, order.tolist())
    assert (ours != theirs).float().mean() <= 2e-3
    assert (ours != compensate(weight, h, scale, zero, scheme, **arguments).codes).float().mean() > 0.05


@pytest.mark.parametrize("same", ["alpha", "inputs"])
@pytest.mark.parametrize("act_order", [True, False])
def test_without_drift_it_is_gptq_to_the_last_bit(same, act_order):
    original, x = streams(96, 500)
    statistics = moments(x if same == "inputs" else original, x)
    parameters = {"alpha": 0.0} if same == "alpha" else {"alpha": 1.0}
    weight = random_weight(40, 96, 4)
    ours = GPTAQ(bits=3, act_order=act_order, **parameters)
    theirs = GPTQ(bits=3, act_order=act_order)
    scheme = ours.weights({"x": 96})
    one, two = (method.solve(weight, scheme, statistics) for method in (ours, theirs))
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scale, two.scale)


@pytest.mark.parametrize("seed", range(3))
def test_the_output_is_closer_to_that_of_the_original_inputs(seed):
    original, x = streams(96, 600, seed=seed)
    statistics, weight = moments(original, x), random_weight(32, 96, seed)
    scheme = WeightScheme(bits=4, group_size=32)

    def off(method):
        q = method.solve(weight, scheme, statistics)
        return float((x @ q.dequantize().T - original @ weight.T).square().sum())

    losses = [off(GPTQ()), off(GPTAQ()), off(GPTAQ(alpha=1.0))]
    assert losses[2] < losses[1] < losses[0]


def test_a_finer_grid_undoes_a_change_that_can_be_undone():
    """Inputs that went through a matrix near one: with many codes the first columns cannot, the last ones do."""
    original, x = streams(48, 500, moved=0.05)
    weight, statistics = random_weight(16, 48, 1), moments(original, x)
    fine = WeightScheme(bits=8, group_size=16, scale_dtype="float32")
    losses = []
    for alpha in (0.0, 1.0):
        q = GPTAQ(bits=8, alpha=alpha).solve(weight, fine, statistics)
        losses.append(float((x @ q.dequantize().T - original @ weight.T).square().sum()))
    assert losses[1] < 0.8 * losses[0]


def test_zeros_of_an_earlier_step_stay():
    original, x = streams(64, 400)
    weight, statistics = random_weight(33, 64, 5), moments(original, x)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    weight = weight.masked_fill(pruned, 0.0)
    method = GPTAQ(bits=3)
    q = method.solve(weight, method.weights({"x": 64}), {**statistics, "pruned": pruned})
    assert not q.dequantize()[pruned].any()
