"""The solver against the paper's equations, written out in float64 without any of the shortcuts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import moment, random_weight

from frugallm.compress.quantize.cholesky import inverse_factor
from frugallm.compress.quantize.grids import encode, fit
from frugallm.compress.quantize.solvers import compensate, proxy_loss
from frugallm.formats.quantized_tensor import WeightScheme


def reference(weight, h, scale, zero, scheme, damp, act_order):
    """OBQ in a fixed order: quantize a column, move its error to the columns left, drop it from the inverse.

    ``w_k <- w_k - e_j [H^-1]_jk / [H^-1]_jj`` and ``H^-1 <- H^-1 - H^-1_:j H^-1_j: / [H^-1]_jj``
    (arXiv 2210.17323, eq. 2 and 3).
    """
    w, h = weight.double().clone(), h.double().clone()
    width = w.shape[1]
    per_scale = scheme.columns_per_scale(width)
    order = (
        torch.argsort(h.diagonal(), descending=True, stable=True).tolist()
        if act_order
        else list(range(width))
    )
    dead = h.diagonal() == 0
    w[:, dead] = 0
    h[dead, dead] = 1
    inverse = torch.linalg.inv(h + damp * h.diagonal().mean() * torch.eye(width))
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    low, high = scheme.code_range
    for place, j in enumerate(order):
        s = scale[:, j // per_scale].double()
        z = 0 if zero is None else zero[:, j // per_scale].double()
        q = (torch.round(w[:, j] / s) + z).clamp(low, high)
        codes[:, j] = q.to(torch.int8)
        error = w[:, j] - s * (q - z)
        rest = order[place + 1 :]
        w[:, rest] -= torch.outer(error, inverse[j, rest] / inverse[j, j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def share_that_differs(a, b):
    return (a != b).float().mean().item()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "bits"), [(16, 4), (32, 3), (None, 4), (None, 8)])
def test_codes_are_those_of_the_equations(act_order, symmetric, group, bits):
    scheme = WeightScheme(bits=bits, symmetric=symmetric, group_size=group)
    weight, h = random_weight(48, 64, 3), moment(64, 400)
    scale, zero = fit(weight, scheme)
    ours = compensate(weight, h, scale, zero, scheme, damp=0.01, act_order=act_order, block_size=16).codes
    theirs = reference(weight, h, scale, zero, scheme, 0.01, act_order)
    assert share_that_differs(ours, theirs) <= 1e-3  # float32 against float64: ties may fall to either side
    assert share_that_differs(ours, encode(weight, scale, zero, scheme)) > 0.05  # it is not plain rounding


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_uncorrelated_inputs_are_rounded_to_nearest(act_order, symmetric):
    scheme = WeightScheme(bits=3, symmetric=symmetric, group_size=16)
    weight = random_weight(33, 64, 5)
    scale, zero = fit(weight, scheme)
    h = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1)
    q = compensate(weight, h, scale, zero, scheme, act_order=act_order)
    assert torch.equal(q.codes, encode(weight, scale, zero, scheme))


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_columns_are_stored_as_zero_and_disturb_nobody(symmetric):
    scheme = WeightScheme(bits=4, symmetric=symmetric, group_size=16)
    weight, h = random_weight(8, 48, 6), moment(48, 300)
    dead = torch.tensor([0, 17, 47])
    h[dead], h[:, dead] = 0, 0
    scale, zero = fit(weight, scheme)
    q = compensate(weight, h, scale, zero, scheme)
    assert (q.dequantize()[:, dead] == 0).all()
    assert share_that_differs(q.codes, reference(weight, h, scale, zero, scheme, 0.01, True)) <= 1e-3


def test_no_inputs_at_all_store_zeros():
    scheme = WeightScheme(bits=4)
    weight = random_weight(4, 32, 7)
    q = compensate(weight, torch.zeros(32, 32), *fit(weight, scheme), scheme)
    assert (q.dequantize() == 0).all()


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_fewer_tokens_than_columns_are_damped_until_it_can_be_solved(damp):
    scheme = WeightScheme(bits=4, group_size=32)
    weight, h = random_weight(8, 64, 8), moment(64, 10)
    _, added = inverse_factor(h, damp)
    assert added > 0
    scale, zero = fit(weight, scheme)
    q = compensate(weight, h, scale, zero, scheme, damp=damp)
    assert q.dequantize().isfinite().all()
    plain = encode(weight, scale, zero, scheme)
    nearest = q.__class__(plain, scale, zero, scheme)
    assert proxy_loss(weight, q.dequantize(), h) < proxy_loss(weight, nearest.dequantize(), h)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, 7, 40, 64, 1000]), st.booleans())
def test_the_block_size_changes_nothing(rows, block_size, act_order):
    scheme = WeightScheme(bits=4, group_size=16)
    weight, h = random_weight(rows, 64, rows), moment(64, 300)
    scale, zero = fit(weight, scheme)
    by_block = compensate(weight, h, scale, zero, scheme, act_order=act_order, block_size=block_size)
    whole = compensate(weight, h, scale, zero, scheme, act_order=act_order, block_size=64)
    assert share_that_differs(by_block.codes, whole.codes) <= 2e-3


def test_the_factor_is_that_of_the_inverse():
    h = moment(40, 200)
    u, added = inverse_factor(h, 0.01)
    damped = h.double() + added * h.double().diagonal().mean() * torch.eye(40)
    assert added == 0.01
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.double().T @ u.double(), torch.linalg.inv(damped), rtol=1e-4, atol=1e-6)


def test_inputs_stay_as_they_were():
    scheme = WeightScheme(bits=3, symmetric=False, group_size=16)
    weight, h = random_weight(5, 32, 9), moment(32, 100)
    scale, zero = fit(weight, scheme)
    before = [t.clone() for t in (weight, h, scale, zero)]
    compensate(weight, h, scale, zero, scheme)
    inverse_factor(h, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, h, scale, zero)))


def test_the_loss_is_the_squared_error_of_the_output():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=generator)
    weight, stored = random_weight(4, 12, 1), random_weight(4, 12, 2)
    loss = proxy_loss(weight, stored, x.T @ x)
    assert loss == pytest.approx(float(((x @ (stored - weight).T) ** 2).sum()), rel=1e-5)
