"""How a compressed linear is described and held: :class:`LinearScheme` and :class:`QuantizedTensor`.

Solvers return a :class:`QuantizedTensor`; exporters and kernels are tested against its :meth:`~QuantizedTensor.dequantize`,
and codes are never derived again from rounded weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from frugallm.formats import levels
from frugallm.formats.extras import Extra

#: Types of scales that are worth a word.
SCALE_LABELS = {"float8_e4m3fn": ", e4m3 scales", "float8_e8m0fnu": ", scales powers of two"}


class WeightScheme(BaseModel):
    """How the weights ``(out, in)`` of a linear are stored: codes on a grid, with one scale a row or a group of a row.

    Attributes
    ----------
    bits
        Bits per code, 2 to 8.
    grid
        Which numbers codes stand for: the integers, or those of :mod:`frugallm.formats.levels`.
    symmetric
        Codes in ``[-2^(b-1), 2^(b-1) - 1]`` and no zero point, or with an integer zero point per group.
    group_size
        Consecutive input columns that share a scale; ``None``: the whole row.
    scale_dtype
        Type in which scales are stored; they are rounded to it before codes are computed. Those in ``float8_e4m3fn``
        are in units of one scale a tensor (``QuantizedTensor.unit``); ``float8_e8m0fnu`` are powers of two.
    zero_dtype
        Type of the zero points of an asymmetric grid: ``int8``, values on the grid of the codes, which are packed as
        the codes are; or ``float16``, which lets the grid begin anywhere.
    extras
        Kinds of what is stored beside the codes (:mod:`frugallm.formats.extras`), in the order in which it is applied.
    second
        How scales and zero points of an asymmetric grid are stored if they are codes themselves: each group's as a row,
        in groups of ``second.group_size`` consecutive outputs. ``None``: as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(ge=2, le=8)
    grid: levels.Grid = "int"
    symmetric: bool = True
    group_size: int | None = None
    scale_dtype: str = "bfloat16"
    zero_dtype: Literal["int8", "float16"] = "int8"
    extras: tuple[str, ...] = ()
    second: WeightScheme | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.grid != "int" and not (self.symmetric and self.bits == levels.BITS[self.grid]):
            raise ValueError(f"grid {self.grid} is symmetric and has {levels.BITS[self.grid]} bits")
        return self

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if self.grid != "int":
            return levels.code_range(self.grid)
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def reach(self) -> float:
        """Where on the grid the largest magnitude of a group is put."""
        return (2**self.bits - 1) / 2 if self.grid == "int" else levels.LARGEST[self.grid]

    @property
    def two_scales(self) -> bool:
        """Whether the scales of groups are in units of one scale a tensor."""
        return self.scale_dtype == "float8_e4m3fn"

    def nearest(self, x: Tensor) -> Tensor:
        """Return the codes of the grid values nearest to ``x``, in units of the scale and without zero point.

        May change its argument; the type of the result is any that holds them.
        """
        if self.grid != "int":
            return levels.nearest_codes(x, self.grid)
        return x.round_().clamp_(*self.code_range)

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes stand for, float32, in units of the scale and without zero point; gradients pass."""
        if self.grid == "int":
            return codes.float()
        found = levels.values_of(codes.detach(), self.grid)
        if codes.requires_grad:
            found = found + (codes - codes.detach()) * levels.slopes(codes.detach(), self.grid)
        return found

    def places(self, x: Tensor) -> Tensor:
        """Return what :meth:`nearest` of ``x`` is before it is rounded; there is no such thing for pairs."""
        return x if self.grid == "int" else levels.places(x, self.grid)

    def columns_per_scale(self, width: int) -> int:
        """Return how many of ``width`` columns share one scale."""
        return self.group_size or width

    def stored_bytes(self, rows: int, width: int) -> int:
        """Return the bytes of codes, scales and zero points of a weight ``(rows, width)``; extras are not counted."""
        codes = 4 * rows * -(-width * self.bits // 32)  # rows end on whole words
        groups = width // self.columns_per_scale(width)
        if self.second is not None:  # scales and zero points are two weights (groups, rows), rows filled up
            filled = -(-rows // self.second.columns_per_scale(rows)) * self.second.columns_per_scale(rows)
            return codes + 2 * self.second.stored_bytes(groups, filled)
        scales = rows * groups * getattr(torch, self.scale_dtype).itemsize
        zeros = 2 * rows if self.zero_dtype == "float16" else 4 * -(-rows * self.bits // 32)
        return codes + scales + (0 if self.symmetric else groups * zeros)

    def label(self) -> str:
        """Return a short name such as ``W4 g64 symmetric``."""
        group = f"g{self.group_size}" if self.group_size else "per row"
        kind = "symmetric" if self.symmetric else "asymmetric"
        if self.grid != "int":
            kind = self.grid + SCALE_LABELS.get(self.scale_dtype, "")
        zero = "" if self.zero_dtype == "int8" else ", float zero"
        second = "" if self.second is None else f", scales in {self.second.bits} bits"
        return f"W{self.bits} {group} {kind}{zero}{second}{''.join(f' + {kind}' for kind in self.extras)}"


class ActivationScheme(BaseModel):
    """How a linear's input is rounded at run time: symmetric, one scale a tensor (static) or a token (dynamic).

    Attributes
    ----------
    grid
        Which numbers codes stand for: the integers, or those of :mod:`frugallm.formats.levels`.
    outliers
        Magnitude from which on a value is an outlier: channels with one in any token of the call are not rounded, and
        the scales of tokens cover the other values. ``None``: everything is rounded. Only with one scale a token.
    clusters
        How many static grids, each with a zero point, the channels share; which channel has which is stored. ``None``:
        one symmetric grid for all. Only where inputs are static.
    reassembled
        Large channels are split and similar ones shared before they are rounded (:mod:`frugallm.formats.channels`).
    rotation
        Order of the Hadamard matrix by which inputs are multiplied before they are rounded, block by block; it is undone
        after that. ``None``: they are rounded as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(8, ge=4, le=8)
    grid: levels.Grid = "int"
    dynamic: bool = True
    outliers: float | None = Field(None, gt=0)
    clusters: int | None = Field(None, ge=1, le=256)
    reassembled: bool = False
    rotation: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.grid != "int" and (self.bits != levels.BITS[self.grid] or self.outliers is not None):
            raise ValueError(f"grid {self.grid} has {levels.BITS[self.grid]} bits and no outliers beside it")
        if self.grid == "olive" and self.dynamic:
            raise ValueError("grid olive has one scale a tensor: that of a token is not known to the decoder")
        return self

    @property
    def reach(self) -> float:
        """Where on the grid the largest magnitude is put."""
        return (2**self.bits - 1) / 2 if self.grid == "int" else levels.LARGEST[self.grid]

    def label(self) -> str:
        """Return a short name such as ``A8 per token``."""
        kind = "" if self.grid == "int" else f" {self.grid}"
        kept = "" if self.outliers is None else f" beside outliers from {self.outliers:g}"
        grids = "" if self.clusters is None else f", {self.clusters} clusters"
        split = ", channels split and shared" if self.reassembled else ""
        rotated = "" if self.rotation is None else " rotated"
        return f"A{self.bits}{kind} {'per token' if self.dynamic else 'static'}{kept}{grids}{split}{rotated}"


class LinearScheme(BaseModel):
    """All that is stored about one linear: its weights and, if its input is rounded, how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: WeightScheme
    activations: ActivationScheme | None = None

    @property
    def static_inputs(self) -> bool:
        """Whether inputs are rounded with a scale that is known beforehand."""
        return self.activations is not None and not self.activations.dynamic

    def label(self) -> str:
        """Return a short name such as ``W8 per row symmetric, A8 per token``."""
        return self.weights.label() + (f", {self.activations.label()}" if self.activations else "")


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight as it will be stored.

    Attributes
    ----------
    codes
        ``(out, in)`` int8.
    scale
        ``(out, groups)`` in the stored type.
    zero
        ``(out, groups)`` in its stored type, or ``None`` when symmetric.
    scheme
        What the numbers mean.
    extras
        What is stored beside the codes, of the kinds that the scheme names.
    second
        Where the scheme has a second level: scale and zero point as they are stored, each a weight ``(groups, out)``
        whose rows are filled up to whole groups. ``scale`` and ``zero`` are what they stand for.
    unit
        ``(1,)`` float32 by which scales are divided, if the scheme has ``two_scales``. It is a power of two.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: WeightScheme
    extras: tuple[Extra, ...] = ()
    second: tuple[QuantizedTensor, QuantizedTensor] | None = None
    unit: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``(out, in)``: the only definition of what the stored values mean.

        That is what the codes stand for (:meth:`on_grid`), and then the extras one after the other.
        """
        weight = self.on_grid()
        for extra in self.extras:
            weight = extra.apply(weight)
        return weight.to(dtype)

    def on_grid(self) -> Tensor:
        """Return ``scale * (value of the code - zero)``, ``(out, in)`` float32, without the extras."""
        rows, width = self.codes.shape
        groups = self.scale.shape[1]
        grouped = self.scheme.values(self.codes).view(rows, groups, width // groups)
        if self.zero is not None:
            grouped = grouped - self.zero.float()[..., None]
        return (grouped * self.step[..., None]).view(rows, width)

    @property
    def step(self) -> Tensor:
        """Scale of every group, ``(out, groups)`` float32, in units of the weight."""
        return self.scale.float() if self.unit is None else self.scale.float() / self.unit

    def plus(self, extra: Extra) -> QuantizedTensor:
        """Return the same with one more extra, of the kind that the scheme names next."""
        return replace(self, extras=(*self.extras, extra))

    def with_zeros(self, mask: Tensor) -> QuantizedTensor:
        """Return the same with the codes of zero where ``mask`` ``(out, in)`` is true; zero points must be whole."""
        groups = self.scale.shape[1]
        zero = torch.zeros((), dtype=torch.int8) if self.zero is None else self.zero[..., None].to(torch.int8)
        codes = self.codes.view(len(self.codes), groups, -1)
        if self.scheme.grid != "int":  # not every zero has the code of zero
            mask = mask & (self.scheme.values(self.codes) != 0)
        return replace(self, codes=torch.where(mask.view_as(codes), zero, codes).view_as(self.codes))

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Return rows ``start`` to ``stop`` as a tensor of their own.

        It has a second level only if it begins with a whole group of outputs; else it can be read, but not stored.
        """
        zero = None if self.zero is None else self.zero[start:stop].clone()
        return replace(
            self,
            codes=self.codes[start:stop].clone(),
            scale=self.scale[start:stop].clone(),
            zero=zero,
            extras=tuple(extra.rows(start, stop) for extra in self.extras),
            second=None if self.second is None else _second_rows(self.second, start, stop),
            unit=None if self.unit is None else self.unit.clone(),
        )


def _second_rows(
    second: tuple[QuantizedTensor, QuantizedTensor], start: int, stop: int
) -> tuple[QuantizedTensor, QuantizedTensor] | None:
    size = second[0].scheme.columns_per_scale(second[0].codes.shape[1])
    if start % size:
        return None
    groups = slice(start // size, -(-stop // size))
    columns = slice(groups.start * size, groups.stop * size)
    scale, zero = (
        replace(
            q,
            codes=q.codes[:, columns].clone(),
            scale=q.scale[:, groups].clone(),
            zero=None if q.zero is None else q.zero[:, groups].clone(),
        )
        for q in second
    )
    return scale, zero


def first_level(second: tuple[QuantizedTensor, QuantizedTensor], rows: int) -> tuple[Tensor, Tensor]:
    """Return scale float32 and zero point float16 ``(rows, groups)`` that a second level stands for."""
    scale, zero = (q.dequantize()[:, :rows].T.contiguous() for q in second)
    return scale, zero.half()


def from_unsigned(codes: Tensor, zero: Tensor, scale: Tensor, bits: int) -> QuantizedTensor:
    """Return unsigned codes ``(out, in)`` with zero points and scales ``(out, groups)``, as other formats keep them.

    The grid is symmetric where all zero points are in the middle, at ``2^(bits - 1)``.
    """
    middle = 2 ** (bits - 1)
    symmetric = bool((zero == middle).all())
    width, groups = codes.shape[1], scale.shape[1]
    scheme = WeightScheme(
        bits=bits,
        symmetric=symmetric,
        group_size=width // groups if groups > 1 else None,
        scale_dtype=str(scale.dtype).removeprefix("torch."),
    )
    signed = None if symmetric else (zero.short() - middle).to(torch.int8)
    return QuantizedTensor((codes.short() - middle).to(torch.int8), scale.contiguous(), signed, scheme)


def to_unsigned(q: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Return codes ``(out, in)`` and zero points ``(out, groups)`` in int16, both from 0 to ``2^bits - 1``."""
    middle = 2 ** (q.scheme.bits - 1)
    zero = torch.full(q.scale.shape, middle, dtype=torch.int16) if q.zero is None else q.zero.short() + middle
    return q.codes.short() + middle, zero
