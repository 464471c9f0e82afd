"""Weights in the kernels' layout: lines of 64 bytes, sixteen output rows beside each other.

A weight ``(out, in)`` is cut into tiles of 16 rows, its rows into groups that share a scale. A line holds, for the 16 rows
of a tile, a few inputs that follow each other:

* ``int4``: 8 inputs. Byte ``4 r + i`` has input ``i`` of row ``r`` in its low half and input ``4 + i`` in its high half,
  as code + 8.
* ``int8``: 4 inputs. Byte ``4 r + i`` is input ``i`` of row ``r``, as code + 128.
* ``bf16``: 2 inputs, 16 bits each. ``float32``: 1 input.

Rows are filled up to whole tiles and inputs to whole groups, with zeros; nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from frugallm.formats import levels
from frugallm.formats.quantized_tensor import QuantizedTensor
from frugallm.kernels import library
from frugallm.kernels.memory import Room

Kind = Literal["int4", "int8", "bf16", "float32"]
KINDS = ("int4", "int8", "bf16", "float32")
TILE = 16
#: Inputs in a line of 64 bytes.
PER_LINE = {"int4": 8, "int8": 4, "bf16": 2, "float32": 1}
#: Inputs that make up a group where there are no scales: two lines.
FLOAT_GROUPS = {"bf16": 4, "float32": 2}
NUMBERS = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.int8: 4}
#: Largest group: its sum of products of 8 bits is below 2^24, so it is a whole number in float32.
LARGEST_GROUP = 256


@dataclass(frozen=True)
class PackedLinear:
    """A weight as the kernels read it.

    Attributes
    ----------
    lines
        uint8 ``(tiles, lines of a row, 64)``.
    scales
        ``(tiles, groups, 16)`` in float16, bfloat16 or float32; ``None`` for floats.
    zeros
        ``(tiles, groups, 16)``: zero points in int8, or minima in a float type; ``None``: the grid is symmetric.
    bias
        float32 ``(tiles * 16,)``, or ``None``.
    kind
        What a line holds.
    rows, width
        Shape of the weight.
    group
        Inputs that share a scale.
    """

    lines: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None
    kind: Kind
    rows: int
    width: int
    group: int

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.width // self.group)

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return len(self.lines)

    @property
    def has_minima(self) -> bool:
        """Whether codes count from 0 and every group has a least value."""
        return self.zeros is not None and self.zeros.dtype != torch.int8

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.nbytes for t in (self.lines, self.scales, self.zeros, self.bias) if t is not None)

    @cached_property
    def struct(self) -> library.Linear:
        """What native code is handed; it is valid as long as this object is."""

        def address(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        return library.Linear(
            lines=address(self.lines),
            scales=address(self.scales),
            zeros=address(self.zeros),
            bias=address(self.bias),
            kind=KINDS.index(self.kind),
            scale_type=0 if self.scales is None else NUMBERS[self.scales.dtype],
            zero_type=0 if self.zeros is None else NUMBERS[self.zeros.dtype],
            rows=self.rows,
            width=self.width,
            group=self.group,
            groups=self.groups,
            tiles=self.tiles,
        )

    def moved(self, room: Room) -> PackedLinear:
        """Return the same in another place."""
        scales, zeros, bias = (
            None if x is None else room.take(x) for x in (self.scales, self.zeros, self.bias)
        )
        return replace(self, lines=room.take(self.lines), scales=scales, zeros=zeros, bias=bias)

    def by_rows(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return codes as they are stored (unsigned) or values ``(out, in)``, scales and zeros ``(out, groups)``."""
        per, tiles = PER_LINE[self.kind], self.tiles
        if self.kind == "int4":
            halves = torch.stack((self.lines & 15, self.lines >> 4), -2)  # (tiles, lines, 2, 64)
            values = halves.view(tiles, -1, 2, TILE, 4).permute(0, 3, 1, 2, 4)
        elif self.kind == "int8":
            values = self.lines.view(tiles, -1, TILE, 4).permute(0, 2, 1, 3)
        else:
            dtype = torch.bfloat16 if self.kind == "bf16" else torch.float32
            values = self.lines.view(dtype).view(tiles, -1, TILE, per).permute(0, 2, 1, 3)
        values = values.reshape(tiles * TILE, -1)[: self.rows, : self.width]
        scales, zeros = (
            None if t is None else t.transpose(1, 2).reshape(tiles * TILE, -1)[: self.rows]
            for t in (self.scales, self.zeros)
        )
        return values, scales, zeros

    def dequantize(self) -> Tensor:
        """Return the weight ``(out, in)`` float32 that is stored."""
        values, scales, zeros = self.by_rows()
        if scales is None:
            return values.float()
        scale, zero = (
            None if t is None else t.float().repeat_interleave(self.group, 1)[:, : self.width]
            for t in (scales, zeros)
        )
        assert scale is not None
        if self.has_minima:
            assert zero is not None
            return scale * values.float() + zero
        middle = 8 if self.kind == "int4" else 128
        return scale * (values.float() - middle - (0 if zero is None else zero))


def _lines(filled: Tensor) -> Tensor:
    """Return rows of whole tiles, cut into words of 4 bytes, as lines of 16 rows, uint8 ``(tiles, words, 64)``."""
    words = filled.contiguous().view(torch.int32).view(len(filled) // TILE, TILE, -1)
    return words.transpose(1, 2).contiguous().view(torch.uint8)


def _filled(x: Tensor, rows: int, columns: int, value: int = 0) -> Tensor:
    if x.shape == (rows, columns):
        return x
    return torch.nn.functional.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0]), value=value)


def _by_tiles(x: Tensor, tiles: int) -> Tensor:
    """Return ``(out, groups)`` as ``(tiles, groups, 16)``."""
    filled = _filled(x, tiles * TILE, x.shape[1]).view(tiles, TILE, -1)
    return aligned(filled.transpose(1, 2).contiguous())


def _bias(bias: Tensor | None, tiles: int) -> Tensor | None:
    return None if bias is None else _filled(bias.float().view(1, -1), 1, tiles * TILE).view(-1).contiguous()


def pack(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, bias: Tensor | None = None
) -> PackedLinear:
    """Pack codes on an integer grid.

    Parameters
    ----------
    codes
        ``(out, in)``: int8, signed; or uint8 from 0 on where ``zeros`` are minima.
    scales
        ``(out, groups)`` in float16, bfloat16 or float32.
    zeros
        ``(out, groups)``: int8 zero points, or minima in a float type; ``None``: symmetric.
    bits
        Bits of a code, 2 to 8: up to 4 are stored in 4, more in 8.
    group
        Inputs that share a scale, a multiple of 8 and at most 256. The last group may be shorter.
    bias
        ``(out,)``.
    """
    rows, width = codes.shape
    tiles, groups = -(-rows // TILE), -(-width // group)
    kind: Kind = "int4" if bits <= 4 else "int8"
    middle = 0 if zeros is not None and zeros.dtype != torch.int8 else 8 if bits <= 4 else 128
    unsigned = _filled(codes.view(torch.uint8) + middle, tiles * TILE, groups * group, middle)  # wraps around
    lines = _lines(unsigned)
    if kind == "int4":  # words in turns: low halves of a line, high halves
        pairs = lines.view(torch.int32).view(tiles, -1, 2, TILE)
        lines = (pairs[:, :, 0] | pairs[:, :, 1] << 4).view(torch.uint8)
    return PackedLinear(
        aligned(lines),
        _by_tiles(scales, tiles),
        None if zeros is None else _by_tiles(zeros, tiles),
        _bias(bias, tiles),
        kind,
        rows,
        width,
        group,
    )


def pack_float(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Pack a weight ``(out, in)`` of floats: bf16 stays what it is, all else becomes float32, which loses nothing."""
    kind: Kind = "bf16" if weight.dtype == torch.bfloat16 else "float32"
    rows, width = weight.shape
    tiles, group = -(-rows // TILE), FLOAT_GROUPS[kind]
    values = weight if kind == "bf16" else weight.float()
    filled = _filled(values, tiles * TILE, -(-width // group) * group)
    return PackedLinear(aligned(_lines(filled)), None, None, _bias(bias, tiles), kind, rows, width, group)


@dataclass(frozen=True)
class Codes:
    """Codes on an integer grid as :func:`pack` takes them."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int

    @property
    def has_minima(self) -> bool:
        """Whether codes count from 0 and every group has a least value."""
        return self.zeros is not None and self.zeros.is_floating_point()

    def pack(self, bias: Tensor | None = None) -> PackedLinear:
        """Return them packed, scales and least values in the smallest type that holds them."""
        zeros = smallest(self.zeros) if self.zeros is not None and self.has_minima else self.zeros
        return pack(self.codes, smallest(self.scales), zeros, self.bits, self.group, bias)

    def in_groups(self, group: int) -> Codes:
        """Return the same in smaller groups, whose size divides that of these."""
        groups = -(-self.codes.shape[1] // group)  # a row may end within a group
        scales, zeros = (
            None if x is None else x.repeat_interleave(self.group // group, 1)[:, :groups]
            for x in (self.scales, self.zeros)
        )
        assert scales is not None
        return replace(self, scales=scales, zeros=zeros, group=group)

    def with_points(self) -> Codes:
        """Return the same with zero points where there are none."""
        zeros = torch.zeros(self.scales.shape, dtype=torch.int8) if self.zeros is None else self.zeros
        return replace(self, zeros=zeros)

    def with_minima(self) -> Codes | None:
        """Return the same with least values; ``None`` where float32 does not hold them, and what they are added to.

        It does if it holds the product of each scale and the largest code, which is odd: that of a smaller code has no
        more digits.
        """
        if self.has_minima:
            return self
        scales, last = self.scales.float(), 2**self.bits - 1
        if not torch.equal((scales * last).double(), scales.double() * last):
            return None
        middle = 2 ** (self.bits - 1)
        zero = torch.zeros(()) if self.zeros is None else self.zeros.float()
        codes = (self.codes.short() + middle).to(torch.uint8)
        return replace(self, codes=codes, scales=scales, zeros=-(zero + middle) * scales)


def codes_of(weight: QuantizedTensor) -> Codes | None:
    """Return a stored weight's codes in groups that the kernels have; ``None``: it is on no integer grid."""
    group = _group_for(weight)
    if group is None:
        return None
    scale, zero, codes, bits = weight.step, weight.zero, weight.codes, weight.scheme.bits
    if weight.scheme.grid == "e2m1":  # twice its values are whole numbers up to 12
        scale, bits = scale / 2, 5
        codes = (2 * levels.levels("e2m1")).to(torch.int8)[codes.int() + levels.last_code("e2m1")]
    if zero is not None and zero.is_floating_point():  # a float zero point is a least value
        middle = 2 ** (bits - 1)
        zero = -(zero.float() + middle) * scale
        codes = (codes.short() + middle).to(torch.uint8)
    repeats = -(-codes.shape[1] // group) // scale.shape[1]  # rows of one scale, and wide groups, are cut up
    zero = None if zero is None else zero.repeat_interleave(repeats, 1)
    return Codes(codes, scale.repeat_interleave(repeats, 1), zero, bits, group)


def packable(weight: QuantizedTensor) -> Codes | Tensor:
    """Return a stored weight's codes, or where it is on no integer grid the float32 values that it stands for."""
    codes = codes_of(weight)
    return weight.dequantize() if codes is None else codes


def pack_weight(weight: Codes | Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Pack codes or values."""
    return weight.pack(bias) if isinstance(weight, Codes) else pack_float(weight, bias)


def joined(weights: Sequence[Codes | Tensor]) -> Codes | Tensor:
    """Return the rows of several weights that read the same input as one weight, its values unchanged.

    Where no grid holds all of them, that is their values in float32.
    """
    codes = [w for w in weights if isinstance(w, Codes)]
    alike = _alike(codes) if len(codes) == len(weights) else None
    if alike is not None:
        zeros = [c.zeros for c in alike if c.zeros is not None]
        return Codes(
            torch.cat([c.codes for c in alike]),
            torch.cat([c.scales.float() for c in alike]),
            torch.cat(zeros) if zeros else None,
            max(c.bits for c in alike),
            alike[0].group,
        )
    values = [pack_weight(w).dequantize() if isinstance(w, Codes) else w for w in weights]
    same = len({v.dtype for v in values}) == 1
    return torch.cat(values if same else [v.float() for v in values])


def _alike(weights: Sequence[Codes]) -> list[Codes] | None:
    """Return weights in groups of one size, all with zero points, all with least values, or none with either."""
    group = math.gcd(*(w.group for w in weights))
    if group % 8:
        return None
    found = [w.in_groups(group) for w in weights]
    if any(w.has_minima for w in found):
        ranged = [with_minima for w in found if (with_minima := w.with_minima()) is not None]
        return ranged if len(ranged) == len(found) else None
    return [w.with_points() for w in found] if any(w.zeros is not None for w in found) else found


def in_turns(weights: Codes | Tensor) -> Codes | Tensor:
    """Return the rows of ``[gate | up]`` in turns of 16, each half filled up: what ``silu(gate) * up`` reads."""
    if isinstance(weights, Tensor):
        return interleaved(*weights.chunk(2))
    zeros = None if weights.zeros is None else interleaved(*weights.zeros.chunk(2))
    codes, scales = (interleaved(*x.chunk(2)) for x in (weights.codes, weights.scales))
    return Codes(codes, scales, zeros, weights.bits, weights.group)


def _group_for(weight: QuantizedTensor) -> int | None:
    """Return the kernels' group for a weight: its own, or a part of it; ``None``: there is none."""
    if weight.scheme.grid not in ("int", "e2m1") or weight.extras or not weight.codes.numel():
        return None
    width, own = weight.codes.shape[1], weight.codes.shape[1] // weight.scale.shape[1]
    if weight.scale.shape[1] == 1:  # rows of one scale may end within a group
        return next((size for size in (128, 64, 32) if width % size == 0), 32)
    sizes = range(min(own, LARGEST_GROUP), 7, -1)
    return next((size for size in sizes if own % size == 0 and size % 8 == 0), None)


def smallest(scale: Tensor) -> Tensor:
    """Return scales in the smallest type that holds all of them."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scale.to(dtype).float(), scale.float()):
            return scale.to(dtype)
    return scale.float()


def aligned(x: Tensor) -> Tensor:
    """Return the tensor, contiguous and beginning on a line of the processor's cache."""
    if x.is_contiguous() and x.data_ptr() % 64 == 0:
        return x
    room = torch.empty(x.nbytes + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    place = room[start : start + x.nbytes].view(x.dtype).view(x.shape)
    return place.copy_(x)


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Return rows of two weights ``(inner, ...)`` in turns of 16, each filled up: what ``silu(gate) * up`` reads."""
    inner = len(gate)
    tiles = -(-inner // TILE)
    pad = (0, 0) * (gate.ndim - 1) + (0, tiles * TILE - inner)
    both = [torch.nn.functional.pad(x, pad).view(tiles, TILE, *x.shape[1:]) for x in (gate, up)]
    return torch.stack(both, 1).reshape(2 * tiles * TILE, *gate.shape[1:])
