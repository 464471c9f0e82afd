"""OWQ against GPTQ's equations in float64 with the kept columns last, and its degenerate cases."""

import pytest
import torch
from shapes import moment, random_weight

from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import fit
from frugallm.compress.quantize.owq import OWQ, sensitivity
from frugallm.compress.quantize.solvers import compensate, proxy_loss
from frugallm.formats.extras import Columns
from frugallm.formats.quantized_tensor import WeightScheme


def reference(weight, h, scale, zero, scheme, kept, damp=0.01):
    """OBQ in the order of decreasing ``H_jj`` with ``kept`` last and not rounded, in float64, without factors."""
    w, h = weight.double().clone(), h.double().clone()
    size = scheme.columns_per_scale(w.shape[1])
    order = torch.argsort(h.diagonal(), descending=True, stable=True).tolist()
    order = [j for j in order if j not in kept]
    h += damp * h.diagonal().mean() * torch.eye(len(h))
    low, high = scheme.code_range
    for place, j in enumerate(order):
        s = scale[:, j // size].double()
        z = 0 if zero is None else zero[:, j // size].double()
        value = s * ((torch.round(w[:, j] / s) + z).clamp(low, high) - z)
        free = [j, *order[place + 1 :], *kept]
        inverse = torch.linalg.inv(h[free][:, free])
        error = w[:, j] - value
        w[:, free[1:]] -= torch.outer(error, inverse[0, 1:] / inverse[0, 0])
        w[:, j] = value
    return w


@pytest.mark.parametrize(("symmetric", "group"), [(True, None), (False, None), (False, 16)])
def test_kept_columns_absorb_what_the_others_leave(symmetric, group):
    scheme = WeightScheme(bits=3, symmetric=symmetric, group_size=group, extras=("columns",))
    weight, h, kept = random_weight(24, 48, 3), moment(48, 400), [5, 40, 17]
    scale, zero = fit(weight, scheme)
    q = compensate(weight, h, scale, zero, scheme, kept=torch.tensor(kept), block_size=16)
    theirs = reference(weight, h, scale, zero, scheme, kept)
    value = q.dequantize().double()
    assert (
        (value - theirs).abs() > 2e-3
    ).float().mean() < 5e-3  # ties may fall to either side, values are float16
    moved = (value[:, kept] - weight[:, kept].double()).abs().mean()
    assert moved > 0.05  # what is stored is not what was there
    uncompensated = value.clone()
    uncompensated[:, kept] = weight[:, kept].double()
    assert proxy_loss(weight, value.float(), h) < 0.9 * proxy_loss(weight, uncompensated.float(), h)


def test_with_nothing_to_spend_it_is_gptq_bit_for_bit():
    weight, h = random_weight(20, 96, 1), moment(96, 500)
    for parameters in ({"bits": 3, "symmetric": False}, {"bits": 4, "group_size": 32, "search": "minmax"}):
        owq, gptq = (
            OWQ(extra_bits=0, **{"symmetric": True, **parameters}),
            GPTQ(**{"group_size": -1, **parameters}),
        )
        scheme = owq.weights({"x": 96})
        assert scheme == gptq.weights({"x": 96})
        ours, theirs = (step.solve(weight, scheme, {"second_moment": h}) for step in (owq, gptq))
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.dequantize(), theirs.dequantize())
        assert not ours.extras


def test_the_columns_are_those_that_rounding_hurts_most():
    weight, h = random_weight(32, 64, 2), moment(64, 600)
    weight[:, 9] *= 8  # a wide column alone is no reason: its input may be small
    h[9], h[:, 9] = h[9] * 1e-4, h[:, 9] * 1e-4
    h[30, 30] = 5 * h.diagonal().max()
    scheme = WeightScheme(bits=3, symmetric=False)
    scale, zero = fit(weight, scheme, "mse", h.diagonal())
    rounded = torch.round(weight / scale.float() + zero.float()).clamp(-4, 3)
    expected = h.diagonal() * ((rounded - zero.float()) * scale.float() - weight).square().sum(0)
    cost = sensitivity(weight, h, scheme)
    torch.testing.assert_close(cost, expected, rtol=1e-2, atol=1e-3)
    step = OWQ(extra_bits=1.0)
    q = step.solve(weight, step.weights({"x": 64}), {"second_moment": h})
    (columns,) = q.extras
    assert isinstance(columns, Columns)
    assert columns.index.tolist() == sorted(
        cost.topk(4).indices.tolist()
    )  # 1 bit of 64 columns is 4 of 16 bits
    assert 30 in columns.index.tolist()
    assert 9 not in columns.index.tolist()


def test_scales_do_not_cover_kept_columns():
    weight, h = random_weight(16, 64, 4), moment(64, 600)
    weight[:, 20] *= 40
    h[20], h[:, 20] = h[20] * 30, h[:, 20] * 30
    step = OWQ(extra_bits=0.25, search="minmax", symmetric=True)  # one column
    q = step.solve(weight, step.weights({"x": 64}), {"second_moment": h})
    assert q.extras[0].index.tolist() == [20]
    others = weight.index_fill(1, torch.tensor([20]), 0)
    assert torch.equal(q.scale, fit(others, q.scheme)[0])
    assert (q.on_grid()[:, 20] == 0).all()


def test_more_columns_leave_less_error_and_all_of_them_none():
    weight, h = random_weight(16, 64, 5), moment(64, 600)
    errors = []
    for extra in (0.0, 1.0, 4.0):
        step = OWQ(extra_bits=extra)
        q = step.solve(weight, step.weights({"x": 64}), {"second_moment": h})
        errors.append(proxy_loss(weight, q.dequantize(), h))
    assert errors[0] > 1.2 * errors[1] and errors[1] > 1.2 * errors[2]
    every = compensate(
        weight, h, *fit(weight, WeightScheme(bits=3)), WeightScheme(bits=3), kept=torch.arange(64)
    )
    torch.testing.assert_close(
        every.dequantize(), weight, rtol=5e-3, atol=5e-3
    )  # float16, and what it rounds off


def test_columns_that_nobody_chose_leave_more_error():
    weight, h = random_weight(32, 96, 6), moment(96, 900)
    errors = {}
    for choice in ("sensitivity", "random"):
        step = OWQ(extra_bits=0.5, choice=choice)
        q = step.solve(weight, step.weights({"x": 96}), {"second_moment": h})
        errors[choice] = proxy_loss(weight, q.dequantize(), h)
    assert errors["sensitivity"] < errors["random"]


def test_zeros_of_an_earlier_step_stay_in_kept_columns_too():
    weight, h = random_weight(16, 64, 7), moment(64, 600)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    step = OWQ(extra_bits=1.0)
    scheme = step.weights({"x": 64})
    q = step.solve(weight.masked_fill(pruned, 0), scheme, {"second_moment": h, "pruned": pruned})
    assert not q.dequantize()[pruned].any()
    assert (q.dequantize()[:, q.extras[0].index] != 0).any()
