"""SpQR against its equations in float64 without any of the shortcuts, and its degenerate cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import moment, random_weight

from frugallm.compress.quantize.fitting_solver import fit_and_compensate
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import fit_second_level
from frugallm.compress.quantize.solvers import proxy_loss
from frugallm.compress.quantize.spqr import SpQR
from frugallm.formats.quantized_tensor import WeightScheme

SECOND = WeightScheme(bits=3, symmetric=False, group_size=16, zero_dtype="float16")


def solve(weight, h, pruned=None, **parameters):
    step = SpQR(**parameters)
    statistics = {"second_moment": h} if pruned is None else {"second_moment": h, "pruned": pruned}
    return step.solve(weight, step.weights({"x": weight.shape[1]}), statistics)


def range_grid(values, levels):
    """Step and zero point of the range of a list of numbers, codes from 0 to ``levels``."""
    low, high = values.min(), values.max()
    step = (high - low) / levels
    return step, -low / step


def rounded(values, step, zero, levels):
    return step * ((values / step + zero).round().clamp(0, levels) - zero)


def second_level(values, size=16, levels=7):
    """Round a column of steps or zero points in chunks of ``size`` rows, steps and zero points kept as ours are."""
    out = values.clone()
    for start in range(0, len(values), size):
        chunk = values[start : start + size]
        step = max((chunk.max() - chunk.min()) / levels, chunk.abs().max() / 2048).bfloat16().double()
        zero = (-4 - chunk.min() / step).half().double()
        out[start : start + size] = step * ((chunk / step + zero).round().clamp(-4, 3) - zero)
    return out


def reference(weight, h, bits, threshold, damp, order, size=16):
    """SpQR with one entry, one group and one column at a time."""
    w, h = weight.double().clone(), h.double().clone()
    rows, width = w.shape
    levels = 2**bits - 1
    h += damp * h.diagonal().mean() * torch.eye(width)
    factor = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    d = torch.empty(width, dtype=torch.float64)
    d[order] = factor.diagonal()
    limit = threshold * (w.var(0, correction=0) / d**2).mean()
    grids, kept = {}, torch.zeros(w.shape, dtype=torch.bool)
    for place, j in enumerate(order):
        group = j // size
        columns = list(range(group * size, (group + 1) * size))
        if group not in grids:
            steps, zeros = torch.empty(rows, dtype=torch.float64), torch.empty(rows, dtype=torch.float64)
            for r in range(rows):
                values, loss = w[r, columns].clone(), []
                for left_out in [None, *range(size)]:
                    some = [k for k in range(size) if k != left_out]
                    error = rounded(values[some], *range_grid(values[some], levels), levels) - values[some]
                    loss.append((error**2 / d[columns][some] ** 2).sum())
                alone = torch.tensor([loss[0] - one > limit for one in loss[1:]])
                if alone.any():
                    values[alone] = values[~alone].mean()
                steps[r], zeros[r] = range_grid(values, levels)
            # Our codes begin at -2^(b-1): so do the zero points that are rounded.
            zeros = second_level(zeros - 2 ** (bits - 1)).half().double() + 2 ** (bits - 1)
            grids[group] = second_level(steps), zeros
        step, zero = grids[group]
        value = rounded(w[:, j], step, zero, levels)
        kept[:, j] = (w[:, j] - value) ** 2 / d[j] ** 2 > limit
        value = torch.where(kept[:, j], w[:, j].half().double(), value)
        error = (w[:, j] - value) / factor[place, place]
        w[:, j] = value
        for later, k in enumerate(order[place + 1 :], place + 1):
            w[:, k] -= error * factor[place, later]
    return w, kept


@pytest.mark.parametrize("act_order", [True, False])
def test_values_and_kept_entries_are_those_of_the_equations(act_order):
    weight, h = random_weight(20, 48, 3), moment(48, 400)
    weight[3, 7], weight[11, 40] = 6.0, -8.0
    order = (
        torch.argsort(h.diagonal(), descending=True, stable=True).tolist() if act_order else list(range(48))
    )
    theirs, kept = reference(weight, h, 3, 0.5, 0.1, order)
    q = solve(weight, h, bits=3, threshold=0.5, damp=0.1, act_order=act_order)
    (entries,) = q.extras
    ours = torch.zeros_like(kept)
    ours[torch.repeat_interleave(entries.counts.long()), entries.columns.long()] = True
    assert 2 <= kept.sum() < 200
    assert (ours != kept).sum() <= 3  # float32 against float64
    same = (q.dequantize().double() - theirs).abs() < 2e-2
    assert same.float().mean() > 0.95
    assert (q.dequantize().double() - theirs).abs().median() < 1e-3


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_without_its_parts_it_is_gptq_bit_for_bit(bits, act_order):
    weight, h = random_weight(24, 96, 1), moment(96, 500)
    q = solve(
        weight, h, bits=bits, threshold=None, second_bits=None, early=True, damp=0.01, act_order=act_order
    )
    gptq = GPTQ(bits=bits, group_size=16, symmetric=False, search="minmax", act_order=act_order)
    scheme = gptq.weights({"x": 96})
    theirs = gptq.solve(weight, scheme, {"second_moment": h})
    assert q.scheme == scheme
    assert q.second is None and not q.extras
    for ours, other in ((q.codes, theirs.codes), (q.scale, theirs.scale), (q.zero, theirs.zero)):
        assert torch.equal(ours, other) and ours.dtype == other.dtype


def test_grids_are_fitted_to_columns_as_they_are_when_reached():
    weight, h = random_weight(16, 48, 2), moment(48, 400)
    seen = {}

    def fit(columns, group, cost):
        seen[group] = columns.clone()
        assert not cost.any()
        low, high = columns.amin(1), columns.amax(1)
        scale = ((high - low) / 7).bfloat16()
        return scale, (-4 - low / scale.float()).round().clamp(-4, 3).to(torch.int8)

    scheme = WeightScheme(bits=3, symmetric=False, group_size=16)
    for block_size in (5, 16, 128):
        q = fit_and_compensate(weight, h, fit, scheme, act_order=False, block_size=block_size)
        value = q.dequantize().double()
        damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(48)
        for start in (16, 32):  # what is best for the columns from here on, those before being what they are
            rest, before = slice(start, None), slice(0, start)
            change = (weight.double() - value)[:, before] @ damped[before, rest]
            best = weight.double()[:, rest] + change @ torch.linalg.inv(damped[rest, rest])
            torch.testing.assert_close(seen[start // 16].double(), best[:, :16], rtol=1e-3, atol=1e-3)
        assert torch.equal(seen[0], weight[:, :16])


def test_entries_that_no_grid_serves_are_kept_and_the_grids_are_fitted_without_them():
    weight, h = random_weight(32, 64, 4), torch.eye(64)
    weight[5, 20] = 30.0
    q, plain = solve(weight, h), solve(weight, h, threshold=None)
    assert q.dequantize()[5, 20] == 30.0
    assert q.scale[5, 1] < plain.scale[5, 1] / 4
    far = (q.dequantize()[5, 16:32] - weight[5, 16:32]).square().sum()
    assert far < (plain.dequantize()[5, 16:32] - weight[5, 16:32]).square().sum() / 10


def test_a_lower_threshold_keeps_more_and_loses_less():
    weight, h = random_weight(32, 96, 5), moment(96, 900)
    found = []
    for threshold in (None, 0.5, 0.1, 0.02):
        q = solve(weight, h, threshold=threshold)
        found.append((sum(len(e.values) for e in q.extras), proxy_loss(weight, q.dequantize(), h)))
    counts, losses = zip(*found)
    assert counts[0] == 0 and sorted(counts) == list(counts) and counts[1] < counts[2] < counts[3]
    assert sorted(losses, reverse=True) == list(losses)


def test_zeros_of_an_earlier_step_stay():
    weight, h = random_weight(40, 64, 7), moment(64, 600)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    for parameters in ({}, {"second_bits": None}, {"bits": 4}, {"early": True}):
        q = solve(weight.masked_fill(pruned, 0), h, pruned, **parameters)
        assert not q.dequantize()[pruned].any()
        assert torch.equal(q.with_zeros(pruned).codes, q.codes)
        assert (q.dequantize()[~pruned] != 0).float().mean() > 0.5


def test_rows_and_columns_without_anything_are_no_harm():
    weight, h = random_weight(16, 48, 8), moment(48, 400)
    weight[2, 16:32] = 0
    weight[4, 32:] = 0.25
    h[40], h[:, 40] = 0, 0
    q = solve(weight, h)
    assert q.dequantize().isfinite().all()
    assert (q.scale > 0).all() and (q.scale < 2).all()
    nothing = torch.zeros_like(weight)
    assert proxy_loss(weight, q.dequantize(), h) < 0.1 * proxy_loss(weight, nothing, h)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 50), st.sampled_from([0.0, 1e-3, 0.3, 5.0]), st.integers(0, 99))
def test_the_second_level_is_within_half_a_step(groups, rows, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    values = 0.01 * (1 + spread * torch.rand(groups, rows, generator=generator))
    q = fit_second_level(values, SECOND)
    assert q.codes.shape == (groups, 16 * math.ceil(rows / 16))
    decoded = q.dequantize()[:, :rows]
    allowed = 0.51 * q.scale.float().repeat_interleave(16, 1)[:, :rows] + values * 2**-7
    assert ((decoded - values).abs() <= allowed).all()
    assert (decoded > 0).all()
    assert torch.equal(fit_second_level(torch.zeros(1, 4), SECOND).dequantize(), torch.zeros(1, 16))
