import math

import pytest
import torch

from frugallm.compress.quantize.hadamard import (
    Rotation,
    hadamard,
    hadamard_block,
    hadamard_rotation,
    keeping_the_mean,
    orthogonal,
    random_hadamard,
    random_kronecker,
    random_orthogonal,
    seeded,
)

WIDTHS = (1, 2, 6, 12, 64, 96, 160, 288)
MAKERS = (random_hadamard, random_kronecker, random_orthogonal, keeping_the_mean)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 60, 64, 76, 108, 140, 148, 256, 576, 1536])
def test_rows_are_orthogonal_and_all_entries_of_one_magnitude(order):
    h = hadamard(order)
    assert h.shape == (order, order) and torch.equal(h.abs(), torch.ones_like(h))
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(h[:, 0], torch.ones(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [0, 3, 6, 18, 52, 92])
def test_an_order_that_is_not_constructed_is_refused(order):
    with pytest.raises(ValueError, match=str(order)):
        hadamard(order)


@pytest.mark.parametrize(
    ("width", "block"), [(576, 576), (1536, 1536), (67, 1), (18, 2), (11008, 256), (14336, 14336), (100, 20)]
)
def test_the_block_is_the_largest_order_that_divides_the_width(width, block):
    assert hadamard_block(width) == block


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_rotation_is_orthogonal_and_undone(make, width):
    rotation = make(width, seeded("test", width))
    r = rotation.matrix(width)
    torch.testing.assert_close(r @ r.T, torch.eye(width, dtype=torch.float64))
    x = torch.randn(3, 5, width, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ r)
    torch.testing.assert_close(rotation.undo(x), x @ r.T)
    torch.testing.assert_close(rotation.undo(rotation.apply(x.float())), x.float())


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_seed_gives_the_same_rotation_and_another_another(make):
    one, again, other = (make(96, seeded("x", seed)).matrix(96) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, other)


def test_factors_are_applied_in_the_order_of_the_kronecker_product():
    a, b, c = (orthogonal(size, seeded(size)) for size in (3, 4, 5))
    x = torch.randn(2, 60, dtype=torch.float64)
    whole = torch.kron(torch.kron(a, b), c)
    torch.testing.assert_close(Rotation((a, b, c)).apply(x), x @ whole)


def test_blocks_on_the_diagonal_do_not_mix():
    h = hadamard_rotation(12)
    r = h.matrix(36)
    torch.testing.assert_close(r, torch.block_diag(*[hadamard(12) / math.sqrt(12)] * 3))


def test_one_large_entry_is_spread_evenly():
    x = torch.zeros(576)
    x[17] = 24.0
    torch.testing.assert_close(random_hadamard(576, seeded(0)).apply(x).abs(), torch.ones(576))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("width", [2, 96, 160])
def test_a_rotation_that_keeps_the_mean_does_and_still_mixes(dense, width):
    rotation = keeping_the_mean(width, seeded(3), dense=dense)
    r = rotation.matrix(width)
    ones = torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(ones), ones)
    torch.testing.assert_close(r @ r.T, torch.eye(width, dtype=torch.float64))
    if width > 2:
        assert r.abs().max() < 8 / math.sqrt(width)


def test_matrices_that_stored_weights_refer_to_stay_as_they_are():
    # Weights are stored in these bases: another matrix of the same order would make every such folder wrong.
    weights = torch.arange(1, 13, dtype=torch.float64)
    found = {order: float(weights[:order] @ hadamard(order)[:12, :12] @ weights) for order in (12, 36, 48)}
    assert found == {12: -494.0, 36: 652.0, 48: -338.0}
