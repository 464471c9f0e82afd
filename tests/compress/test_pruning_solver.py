"""The column solve with zeros in it against the equations of SparseGPT in float64, without any of the shortcuts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import moment, random_weight

from frugallm.compress.prune.unstructured.masks import Sparsity
from frugallm.compress.prune.unstructured.sparsegpt import SparseGPT
from frugallm.compress.quantize.cholesky import inverse_factor
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import fit
from frugallm.compress.quantize.solvers import compensate, proxy_loss, prune_and_compensate
from frugallm.formats.quantized_tensor import WeightScheme

HALF = Sparsity(share=0.5)


def smallest(scores, count):
    """Mark the ``count`` smallest of a table of scores, one after the other."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    flat = mask.view(-1)
    flat[torch.argsort(scores.reshape(-1), stable=True)[:count]] = True
    return mask


def reference(weight, h, sparsity, damp, order, block_size=128, quant=None):
    """OBS in a fixed order: zero (and round) a column, move its error to the columns left, drop it from the inverse.

    ``w_k <- w_k - e_j [H^-1]_jk / [H^-1]_jj`` and ``H^-1 <- H^-1 - H^-1_:j H^-1_j: / [H^-1]_jj``. The score of an entry
    is ``w^2 / [H^-1]_jj`` with the inverse over the columns from its own on, which is ``w^2 / U_jj^2``.
    """
    w, h = weight.double().clone(), h.double().clone()
    width = w.shape[1]
    dead = h.diagonal() == 0
    w[:, dead] = 0
    h[dead, dead] = 1
    h += damp * h.diagonal().mean() * torch.eye(width)
    conditional = {}  # [H^-1]_jj over the columns from j on
    for place, j in enumerate(order):
        rest = order[place:]
        conditional[j] = torch.linalg.inv(h[rest][:, rest])[0, 0]
    mask = torch.zeros(w.shape, dtype=torch.bool)
    span = sparsity.group or block_size
    for place, j in enumerate(order):
        if place % span == 0:
            chunk = order[place : place + span]
            scores = torch.stack([w[:, k] ** 2 / conditional[k] for k in chunk], 1)
            if sparsity.group:
                rows = [smallest(row, sparsity.count(len(chunk))) for row in scores]
                mask[:, chunk] = torch.stack(rows)
            else:
                mask[:, chunk] = smallest(scores, sparsity.count(scores.numel()))
        value = w[:, j].masked_fill(mask[:, j], 0)
        value = value if quant is None else quant(value, j)
        error, rest = w[:, j] - value, order[place:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        w[:, j] = value
        w[:, rest[1:]] -= torch.outer(error, inverse[0, 1:] / inverse[0, 0])
    return w, mask


def left_to_right(h):
    return list(range(len(h)))


def by_size(h):
    return torch.argsort(h.diagonal(), descending=True, stable=True).tolist()


@pytest.mark.parametrize(
    ("sparsity", "order", "block_size"),
    [
        (HALF, left_to_right, 16),
        (Sparsity(share=0.7), left_to_right, 128),
        (HALF, by_size, 16),
        (Sparsity(share=0.5, pattern="2:4"), left_to_right, 16),
        (Sparsity(share=0.5, pattern="4:8"), left_to_right, 16),
    ],
)
def test_zeros_and_values_are_those_of_the_equations(sparsity, order, block_size):
    weight, h = random_weight(24, 48, 3), moment(48, 400)
    act_order = order is by_size
    ours = prune_and_compensate(weight, h, sparsity, act_order=act_order, block_size=block_size)
    theirs, mask = reference(weight, h, sparsity, 0.01, order(h), block_size)
    assert ((ours == 0) != mask).sum() <= 2  # float32 against float64: scores may be equal to the last bit
    same = ((ours == 0) == mask).all(1)  # a row in which a zero moved goes on differently
    assert same.float().mean() > 0.9
    torch.testing.assert_close(ours[same].double(), theirs[same], rtol=1e-3, atol=1e-3)
    assert not torch.equal(ours == 0, smallest(weight.abs(), int(mask.sum())))  # it is not magnitude


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_both_at_once_are_those_of_the_equations(pattern, symmetric):
    scheme = WeightScheme(bits=4, symmetric=symmetric, group_size=16)
    sparsity = Sparsity(share=0.5, pattern=pattern)
    weight, h = random_weight(24, 48, 3), moment(48, 400)
    scale, zero = fit(weight, scheme)
    low, high = scheme.code_range

    def quant(value, j):
        s = scale[:, j // 16].double()
        z = 0 if zero is None else zero[:, j // 16].double()
        return s * ((torch.round(value / s) + z).clamp(low, high) - z)

    q = compensate(weight, h, scale, zero, scheme, act_order=False, block_size=16, sparsity=sparsity)
    theirs, mask = reference(weight, h, sparsity, 0.01, left_to_right(h), 16, quant)
    assert (q.dequantize()[mask] != 0).float().mean() <= 2e-3
    assert ((q.dequantize() - theirs).abs() > 1e-4).float().mean() <= 5e-3


def test_the_error_that_is_left_is_the_sum_of_the_scores():
    """With the order and no damping, ``tr(D H D^T)`` is ``sum e_j^2``: what the scores predict is what comes out."""
    weight, h = random_weight(12, 40, 1), moment(40, 400)
    value = prune_and_compensate(weight, h, HALF, damp=0.0)
    u, _ = inverse_factor(h, 0.0)
    # e_j from the result alone: D = -E U, so E = -D U^-1
    e = -(value - weight).double() @ torch.linalg.inv(u.double())
    assert proxy_loss(weight, value, h) == pytest.approx(float(e.square().sum()), rel=1e-3)
    kept = e[value != 0]
    assert kept.abs().max() <= 1e-4 * e.abs().max()  # weights that stay make no error when their turn comes


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.sampled_from([0.1, 0.5]), st.booleans(), st.integers(0, 5))
def test_compensation_does_not_lose_against_its_own_zeros(rows, share, act_order, seed):
    """No theorem: with three of four weights gone, the few that are left are sometimes moved too far."""
    weight, h = random_weight(rows, 64, seed), moment(64, 300, seed)
    value = prune_and_compensate(weight, h, Sparsity(share=share), act_order=act_order)
    assert int((value == 0).sum()) == round(share * value.numel())
    alone = weight.masked_fill(value == 0, 0.0)
    assert proxy_loss(weight, value, h) <= proxy_loss(weight, alone, h) * (1 + 1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.sampled_from(["2:4", "4:8"]), st.sampled_from([8, 16, 64, 1024]))
def test_patterns_are_exact_in_every_group_and_the_block_size_changes_nothing(rows, pattern, block_size):
    sparsity = Sparsity(share=0.5, pattern=pattern)
    weight, h = random_weight(rows, 64, rows), moment(64, 300)
    value = prune_and_compensate(weight, h, sparsity, block_size=block_size)
    counts = (value == 0).view(rows, -1, sparsity.group).sum(-1)
    assert (counts == sparsity.group // 2).all()
    whole = prune_and_compensate(weight, h, sparsity, block_size=64)
    assert ((value == 0) != (whole == 0)).float().mean() <= 5e-3


def test_uncorrelated_inputs_are_pruned_by_size_and_left_alone():
    """With a diagonal H nothing can be made up for, and the score is ``w^2 H_jj``: Wanda's, squared."""
    weight = random_weight(9, 32, 2)
    diagonal = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.1
    value = prune_and_compensate(weight, torch.diag(diagonal), HALF, damp=0.0)
    mask = smallest(weight.square() * diagonal, 9 * 16)
    assert torch.equal(value, weight.masked_fill(mask, 0.0))


@pytest.mark.parametrize("act_order", [True, False])
def test_no_zeros_and_bits_are_gptq_to_the_last_bit(act_order):
    weight, h = random_weight(40, 96, 4), moment(96, 500)
    before = {"second_moment": h}
    joint, plain = (
        method.solve(weight, method.weights({"x": 96}), before)
        for method in (
            SparseGPT(sparsity=0.0, bits=3, act_order=act_order),
            GPTQ(bits=3, act_order=act_order),
        )
    )
    assert torch.equal(joint.codes, plain.codes) and torch.equal(joint.scale, plain.scale)


def test_no_zeros_and_no_bits_change_nothing():
    weight, h = random_weight(10, 64, 4), moment(64, 500)
    value = SparseGPT(sparsity=0.0).prune(weight, {"second_moment": h})
    torch.testing.assert_close(value, weight, rtol=0, atol=0)


def test_many_bits_are_pruning_alone():
    """On a fine grid with room for weights that grow, both at once is pruning."""
    weight, h = random_weight(10, 64, 4), moment(64, 500)
    scheme = WeightScheme(bits=8, group_size=16, scale_dtype="float32")
    scale, _ = fit(2 * weight, scheme)
    joint = compensate(weight, h, scale, None, scheme, act_order=False, sparsity=HALF).dequantize()
    alone = prune_and_compensate(weight, h, HALF)
    assert ((joint == 0) != (alone == 0)).float().mean() <= 0.02
    assert (joint - alone).norm() <= 0.02 * alone.norm()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_given_zeros_stay_and_are_worth_telling(symmetric, act_order):
    weight, h = random_weight(33, 64, 5), moment(64, 400)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    weight = weight.masked_fill(pruned, 0.0)
    method = GPTQ(bits=3, symmetric=symmetric, act_order=act_order)
    scheme = method.weights({"x": 64})
    told = method.solve(weight, scheme, {"second_moment": h, "pruned": pruned})
    assert not told.dequantize()[pruned].any()
    untold = method.solve(weight, scheme, {"second_moment": h})
    assert untold.dequantize()[pruned].any()
    after = untold.with_zeros(pruned)
    assert not after.dequantize()[pruned].any()
    losses = [proxy_loss(weight, q.dequantize(), h) for q in (told, after)]
    assert losses[0] < losses[1]


def test_dead_columns_and_no_input_are_zero():
    weight, h = random_weight(8, 48, 6), moment(48, 300)
    dead = torch.tensor([0, 17, 47])
    h[dead], h[:, dead] = 0, 0
    value = prune_and_compensate(weight, h, HALF)
    assert (value[:, dead] == 0).all() and int((value == 0).sum()) == 8 * 24
    assert (prune_and_compensate(weight, torch.zeros(48, 48), HALF) == 0).all()


def test_inputs_stay_as_they_were():
    weight, h = random_weight(5, 32, 9), moment(32, 100)
    before = weight.clone(), h.clone()
    prune_and_compensate(weight, h, HALF)
    assert torch.equal(before[0], weight) and torch.equal(before[1], h)
