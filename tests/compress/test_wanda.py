"""Wanda against its formula, entry by entry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import random_weight

from frugallm.compress.prune.unstructured.magnitude import Magnitude
from frugallm.compress.prune.unstructured.wanda import Wanda


def inputs(tokens, width, seed=0):
    """Inputs of which some channels are far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) * torch.logspace(-2, 2, width)


def prune(method, weight, x):
    return method.prune(weight, {"mean_square": x.square().mean(0)})


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(2, 40), st.floats(0, 0.95), st.integers(0, 3))
def test_every_row_loses_what_scores_least(rows, width, share, seed):
    weight, x = random_weight(rows, width, seed), inputs(30, width, seed)
    value = prune(Wanda(sparsity=share), weight, x)
    norms = x.double().norm(dim=0)
    for before, after in zip(weight, value):
        order = sorted(range(width), key=lambda j: float(before[j].double().abs() * norms[j]))
        gone = set(order[: round(share * width)])
        assert {j for j in range(width) if after[j] == 0} == gone
        assert all(after[j] == before[j] for j in set(range(width)) - gone)


def test_both_the_norm_and_the_comparison_by_row_matter():
    """The paper's ablation: neither is magnitude, and with equal inputs only the comparison by row is left."""
    weight = random_weight(16, 32, 1) * torch.logspace(-1, 1, 16)[:, None]  # rows of different size
    x, equal = inputs(50, 32), torch.ones(5, 32)
    by_layer = Magnitude().prune(weight, {}) == 0
    by_row = prune(Wanda(), weight, equal) == 0
    assert (by_row.sum(1) == 16).all() and not (by_layer.sum(1) == 16).all()
    assert not torch.equal(by_row, prune(Wanda(), weight, x) == 0)
    for row, mask in zip(weight.abs(), by_row):
        assert row[mask].max() <= row[~mask].min()


def test_the_size_of_all_inputs_changes_nothing():
    weight, x = random_weight(9, 24, 2), inputs(50, 24)
    assert torch.equal(prune(Wanda(), weight, x), prune(Wanda(), weight, 1e4 * x))


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_patterns_lie_along_the_inputs(pattern):
    group = int(pattern[-1])
    value = prune(Wanda(pattern=pattern), random_weight(6, 48, 3), inputs(50, 48))
    assert ((value == 0).view(6, -1, group).sum(-1) == group // 2).all()


def test_inputs_that_never_came_go_first_the_smallest_weights_before_others():
    weight, x = random_weight(5, 12, 4), inputs(50, 12)
    x[:, 2:10] = 0
    value = prune(Wanda(sparsity=0.5), weight, x)
    for before, after in zip(weight.abs(), value):
        dead = before[2:10]
        assert torch.equal(after[2:10] == 0, dead <= dead.sort().values[5])
    nothing = prune(Wanda(sparsity=0.5), weight, torch.zeros(3, 12))
    assert torch.equal(nothing, prune(Wanda(sparsity=0.5), weight, torch.ones(3, 12)))
