"""Rounding on a grid whose range is trained: the ways in which a clipping factor learns."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme

#: ``dynamic``: a factor of the mean magnitude, moved by all weights; ``lsq``: the range itself, moved by all weights;
#: ``pact``: the range itself, moved by the weights beyond it alone.
Scaling = Literal["dynamic", "lsq", "pact"]
SMALLEST = 1e-8


def levels(bits: int) -> int:
    """Return the largest code: grids hold ``-levels`` to ``levels``, so 2 bits are ternary."""
    return 2 ** (bits - 1) - 1


def clipped_codes(weight: Tensor, clip: Tensor, bits: int) -> QuantizedTensor:
    """Return the codes of ``weight (rows, columns)`` clipped to ``clip``, ``(1,)`` or ``(rows,)``.

    The scale is rounded to the bf16 in which it is stored; one a row is stored whether or not they are all the same.
    """
    largest = levels(bits)
    scale = (clip.float().clamp(min=SMALLEST) / largest).bfloat16().float()  # (1,) or (rows,)
    codes = (weight / scale[:, None]).round_().clamp_(-largest, largest).to(torch.int8)
    rows = scale.expand(len(weight)).bfloat16()[:, None].contiguous()
    return QuantizedTensor(codes, rows, None, WeightScheme(bits=bits))


class _Clipped(torch.autograd.Function):
    """Values on the clipped grid; gradients of the weights inside the range, and of the range."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, clip: Tensor, bits: int, scaling: Scaling) -> Tensor:
        q = clipped_codes(weight, clip, bits)
        values = q.dequantize()
        ctx.save_for_backward(weight, q.scale.float() * levels(bits), values, clip)
        ctx.bits, ctx.scaling = bits, scaling
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, widest, values, clip = ctx.saved_tensors
        inside = weight.abs() <= widest
        slope = torch.where(inside, (values - weight) / widest, weight.sign())
        if ctx.scaling == "pact":
            slope = torch.where(inside, 0.0, slope)
        by_clip = gradients[0] * slope
        moved = by_clip.sum(1) if len(clip) > 1 else by_clip.sum().reshape(1)
        if ctx.scaling == "lsq":
            moved = moved / (levels(ctx.bits) * weight.numel() / len(clip)) ** 0.5
        return gradients[0] * inside, moved, None, None


def clipped(weight: Tensor, clip: Tensor, bits: int, scaling: Scaling) -> Tensor:
    """Return ``weight (rows, columns)`` rounded on the grid that ``clip`` ``(1,)`` or ``(rows,)`` ends, float32.

    With ``Q(u)`` the nearest level and ``a`` the range, ``d/da`` is ``Q(w/a) - w/a`` inside the range and ``sign(w)``
    beyond it; for ``pact`` zero inside, for ``lsq`` divided by the root of levels times weights. ``d/dw`` is one inside
    and zero beyond.
    """
    return _Clipped.apply(weight, clip, bits, scaling)
