"""Trained ranges against plain float64 and finite differences."""

import pytest
import torch

from frugallm.training.scaling import clipped, clipped_codes, levels


def _weight(rows=6, columns=10):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.05


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("by_row", [False, True])
def test_values_are_the_nearest_levels_of_the_clipped_weight(bits, by_row):
    weight, largest = _weight(), levels(bits)
    clip = weight.abs().mean(1) if by_row else weight.abs().mean().reshape(1)
    scale = (clip / largest).bfloat16().double()[:, None]
    wanted = scale * (weight.double().clamp(-scale * largest, scale * largest) / scale).round()
    values = clipped(weight, clip, bits, "dynamic")
    assert torch.allclose(values.double(), wanted, atol=1e-9)
    assert torch.equal(values, clipped_codes(weight, clip, bits).dequantize())
    assert values.unique().numel() <= (2 * largest + 1) * (6 if by_row else 1)


@pytest.mark.parametrize(("scaling", "inside"), [("dynamic", True), ("lsq", True), ("pact", False)])
def test_the_range_is_moved_as_the_papers_say(scaling, inside):
    weight = _weight().requires_grad_(True)
    clip = torch.tensor([0.0625]).requires_grad_(True)  # a power of two: stored exactly
    slope = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    (clipped(weight, clip, 2, scaling) * slope).sum().backward()
    w, a, g = weight.detach().double(), 0.0625, slope.double()
    beyond = w.abs() > a
    assert beyond.any() and not beyond.all()
    within = ((w / a).round() - w / a) if inside else torch.zeros_like(w)
    wanted = (g * torch.where(beyond, w.sign(), within)).sum()
    if scaling == "lsq":
        wanted = wanted / weight.numel() ** 0.5
    assert clip.grad.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.equal(weight.grad, slope * ~beyond)


def test_every_row_moves_its_own_range():
    weight = _weight()
    clip = weight.abs().mean(1).requires_grad_(True)
    slope = torch.zeros_like(weight)
    slope[2] = 1
    (clipped(weight, clip, 2, "dynamic") * slope).sum().backward()
    assert clip.grad[2] != 0
    assert (clip.grad != 0).sum() == 1


def test_a_range_that_has_died_still_gives_finite_values():
    weight = _weight()
    for clip in (0.0, -1.0):
        assert clipped(weight, torch.tensor([clip]), 2, "lsq").isfinite().all()
