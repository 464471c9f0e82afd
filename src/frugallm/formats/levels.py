"""Grids that are not the integers: which numbers their codes stand for, before any scale.

=====  ====  =====================================================================================================
grid   bits  values
=====  ====  =====================================================================================================
e2m1   4     ``0, 0.5, 1, 1.5, 2, 3, 4, 6`` with either sign: FP4
e4m3   8     floats with 4 bits of exponent and 3 of mantissa, up to 448, with either sign: FP8
olive  4     pairs of neighbors: both from -7 to 7, or an outlier, ``12, 16, 24, 32, 48, 64, 96`` with either sign, and 0
=====  ====  =====================================================================================================

A code of a float is the rank of its value, counted from zero: code ``-7`` of ``e2m1`` stands for -6, code 0 for 0. A number
halfway between two values goes to the even code, which is the one with an even mantissa.

Codes of ``olive`` are read in pairs. Code -8 says that the other of the pair is the rank of an outlier, and itself stands
for 0, the victim that gave its place. Of two outliers in a pair the larger stays.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

Grid = Literal["int", "e2m1", "e4m3", "olive"]

BITS = {"e2m1": 4, "e4m3": 8, "olive": 4}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Where the largest magnitude of a group is put; in ``olive`` the largest that is no outlier.
LARGEST = {"e2m1": 6.0, "e4m3": 448.0, "olive": 7.0}
_VICTIM = -8
_OUTLIERS = torch.tensor([0.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0])
_OUTLIER_ENDS = (_OUTLIERS[2:] + _OUTLIERS[1:-1]) / 2
_FIRST_OUTLIER = (LARGEST["olive"] + float(_OUTLIERS[1])) / 2


@cache
def levels(grid: str) -> Tensor:
    """Return the values of all codes of a float grid in order, ``(2 n + 1,)`` float32 ascending, 0 in the middle."""
    if grid == "e2m1":
        magnitudes = torch.tensor(_E2M1)
    else:
        magnitudes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.cat([-magnitudes[1:].flip(0), magnitudes])


@cache
def _ends(grid: str) -> Tensor:
    """Return the largest number that goes to each value but the last."""
    values = levels(grid)
    middle = (values[1:] + values[:-1]) / 2
    above = torch.arange(1, len(values)) - last_code(grid)
    below = torch.nextafter(middle, torch.tensor(-torch.inf))
    return torch.where(above % 2 == 0, below, middle)


def last_code(grid: str) -> int:
    """Return the code of the largest value of a float grid; the smallest has its negative."""
    return len(levels(grid)) // 2


def code_range(grid: str) -> tuple[int, int]:
    """Return the smallest and the largest code."""
    return (_VICTIM, 7) if grid == "olive" else (-last_code(grid), last_code(grid))


def nearest_codes(x: Tensor, grid: str) -> Tensor:
    """Return the codes, int32, of the values nearest to ``x``; with ``olive`` pairs lie in its last dimension."""
    if grid == "olive":
        return _nearest_pairs(x)
    return torch.bucketize(x, _ends(grid), out_int32=True) - last_code(grid)


def values_of(codes: Tensor, grid: str) -> Tensor:
    """Return the values, float32, of codes; with ``olive`` pairs lie in their last dimension."""
    if grid == "olive":
        return _values_of_pairs(codes)
    return levels(grid)[codes.int() + last_code(grid)]


def places(x: Tensor, grid: str) -> Tensor:
    """Return where ``x`` lies among the values of a float grid, in codes: whole at each value, in proportion between."""
    values = levels(grid)
    below = torch.bucketize(x, values[1:-1], right=True)
    return below + (x - values[below]) / (values[below + 1] - values[below]) - last_code(grid)


def slopes(codes: Tensor, grid: str) -> Tensor:
    """Return by how much the values of a float grid grow for each code around ``codes``."""
    (difference,) = torch.gradient(levels(grid))
    return difference[codes.int() + last_code(grid)]


def nearest_values(x: Tensor, grid: str) -> Tensor:
    """Return the values nearest to ``x`` float32."""
    if grid == "e4m3":  # the processor's own conversion; beyond the range it would give NaN
        return x.clamp(-LARGEST[grid], LARGEST[grid]).to(torch.float8_e4m3fn).float()
    return values_of(nearest_codes(x, grid), grid)


def _nearest_pairs(x: Tensor) -> Tensor:
    size = x.abs()
    other = size.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    first = torch.arange(x.shape[-1]) % 2 == 0
    stays = (size > _FIRST_OUTLIER) & ((size > other) | ((size == other) & first))
    victim = stays.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    rank = torch.bucketize(size, _OUTLIER_ENDS, out_int32=True) + 1
    outlier = torch.where(x < 0, -rank, rank)
    normal = x.round().clamp(-LARGEST["olive"], LARGEST["olive"]).int()
    return torch.where(stays, outlier, torch.where(victim, _VICTIM, normal))


def _values_of_pairs(codes: Tensor) -> Tensor:
    other = codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    normal = codes.float()
    outlier = torch.copysign(_OUTLIERS[normal.abs().clamp(max=7).int()], normal)
    value = torch.where(other == _VICTIM, outlier, normal)
    return value.masked_fill(codes == _VICTIM, 0.0)
