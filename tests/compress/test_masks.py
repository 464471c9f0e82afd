"""Masks have exactly the zeros that they should, whatever the scores."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugallm.compress.contract import PruneMethod
from frugallm.compress.prune.unstructured.magnitude import Magnitude
from frugallm.compress.prune.unstructured.masks import Sparsity, choose_zeros, lowest, pattern_share
from frugallm.compress.prune.unstructured.random import Random
from frugallm.errors import ParameterError


def score_table(rows, width, kinds, seed):
    """Scores of few different values, so that most are equal to others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, kinds, (rows, width), generator=generator).float()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 50), st.data())
def test_the_lowest_are_marked_and_of_equal_ones_the_first(rows, width, kinds, data):
    scores = score_table(rows, width, kinds, seed=rows * width)
    count = data.draw(st.integers(0, width))
    mask = lowest(scores, count)
    order = np.argsort(scores.numpy(), axis=-1, kind="stable")[:, :count]
    wanted = torch.zeros(rows, width, dtype=torch.bool)
    wanted.scatter_(1, torch.from_numpy(order), True)
    assert torch.equal(mask, wanted)


@pytest.mark.parametrize("within", ["row", "layer"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_unstructured_zeros_are_counted_by_row_or_by_layer(share, within):
    scores = score_table(7, 30, 1000, 0) * torch.arange(1, 8)[:, None]  # rows of different size
    mask = choose_zeros(scores, Sparsity(share=share), within)
    assert int(mask.sum()) == (7 * round(30 * share) if within == "row" else round(210 * share))
    by_row = mask.sum(1)
    assert (by_row == by_row[0]).all() or within == "layer"
    kept, gone = scores.masked_fill(mask, torch.inf), scores.masked_fill(~mask, -torch.inf)
    dim = (1,) if within == "row" else (0, 1)
    assert (gone.amax(dim) <= kept.amin(dim)).all()
    if within == "layer" and share > 0:
        assert by_row[0] > by_row[-1]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["2:4", "4:8"]), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9))
def test_patterns_are_exact_in_every_group(pattern, rows, groups, kinds):
    sparsity = Sparsity(share=0.5, pattern=pattern)
    scores = score_table(rows, groups * sparsity.group, kinds, seed=rows)
    mask = choose_zeros(scores, sparsity, "row")
    assert (mask.view(rows, groups, sparsity.group).sum(-1) == sparsity.group // 2).all()
    assert torch.equal(mask, choose_zeros(scores, sparsity, "layer"))
    kept = scores.masked_fill(mask, torch.inf).view(rows, groups, -1).amin(-1)
    assert (scores.masked_fill(~mask, -1).view(rows, groups, -1).amax(-1) <= kept).all()


def test_patterns_say_their_share_and_their_name():
    assert pattern_share("unstructured") is None
    assert pattern_share("2:4") == pattern_share("4:8") == 0.5
    assert Sparsity(share=0.5, pattern="4:8").label() == "50 % zeros, 4:8"
    assert Sparsity(share=0.55).label() == "55 % zeros"
    assert Sparsity(share=0.5).group is None and Sparsity(share=0.5, pattern="2:4").group == 4


@pytest.mark.parametrize(
    ("method", "widths", "says"),
    [
        (Magnitude(sparsity=0.6, pattern="2:4"), {}, "2:4 makes 0.5 of the weights zero, not sparsity 0.6"),
        (Magnitude(pattern="4:8"), {"a": 16, "b": 20}, "4:8 does not fit the 20 inputs of b"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(method, widths, says):
    with pytest.raises(ParameterError, match=says):
        method.zeros(widths)


def test_magnitude_takes_the_smallest_of_the_layer():
    weight = torch.tensor([[3.0, -0.1, 2.0, -4.0], [0.2, 30.0, -0.3, 20.0]])
    assert torch.equal(
        Magnitude(sparsity=0.375).prune(weight, {}), weight * torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1.0]])
    )
    assert torch.equal(
        Magnitude(pattern="2:4").prune(weight, {}), weight * torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1.0]])
    )


def test_random_places_are_those_of_the_seed_and_of_the_weight():
    weight = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    one, again, other = (Random(seed=s).prune(weight, {}) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert (one == 0).sum() == (other == 0).sum() == 320
    assert ((one == 0) & (other == 0)).float().mean() == pytest.approx(0.25, abs=0.06)
    elsewhere = Random().prune(weight + 1, {}) == 0
    assert (elsewhere & (one == 0)).float().mean() == pytest.approx(0.25, abs=0.06)


def test_the_base_of_pruners_is_no_method_by_itself():
    assert "card" not in vars(PruneMethod)
