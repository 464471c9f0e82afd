"""A stored weight in a GGUF type with its own codes: nothing is fitted again, only scales are said in float16."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from frugallm.formats.gguf_types import pack_five, pack_nibbles
from frugallm.formats.quantized_tensor import QuantizedTensor

BLOCK = 32
SIGNED = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
WITH_MINIMUM = {"Q4_1": 4, "Q5_1": 5}


def type_for(bits: int) -> str:
    """Return the smallest of the plain types that holds the codes of symmetric weights of so many bits, or 16 of a float."""
    return "BF16" if bits == 16 else next(kind for kind, most in SIGNED.items() if bits <= most)


def transcode(q: QuantizedTensor, kind: str) -> np.ndarray | None:
    """Return rows of type ``kind`` ``(rows, bytes)`` uint8 with the codes of ``q``, or ``None`` where they do not fit.

    Scales, and minima, are rounded to float16. Where that changes none of them the values are those of ``q`` to the last
    bit; whoever asks compares. Scales in bfloat16 have fewer digits than float16 holds, so they stay as they are
    unless they are below 6e-5 or above 65504.

    A symmetric grid is one of multiples of its scale, and so is an asymmetric one: ``s (code - zero)``. A type with a
    minimum holds any run of 16 or 32 such multiples; where the run may begin at several, one is taken whose product
    with the scale float16 holds. FP4 with scales that are powers of two is MXFP4.
    """
    rows, width = q.codes.shape
    columns = width // q.scale.shape[1]
    if columns % BLOCK or q.extras or (q.zero is not None and q.zero.is_floating_point()):
        return None
    if q.scheme.grid != "int":
        fits = kind == "MXFP4" and q.scheme.grid == "e2m1" and q.scheme.scale_dtype == "float8_e8m0fnu"
        return _mxfp4(q).numpy().reshape(rows, -1) if fits else None
    multiples = q.codes.to(torch.int16)
    if q.zero is not None:
        multiples = multiples - q.zero.to(torch.int16).repeat_interleave(columns, 1)
    multiples = multiples.reshape(-1, BLOCK)
    scale = q.scale.float().repeat_interleave(columns // BLOCK, 1).reshape(-1)
    packed: Tensor | None = None
    if kind in SIGNED:
        packed = _signed(multiples, scale, SIGNED[kind])
    if kind in WITH_MINIMUM:
        packed = _with_minimum(multiples, scale, WITH_MINIMUM[kind])
    return None if packed is None else packed.numpy().reshape(rows, -1)


def _signed(multiples: Tensor, scale: Tensor, bits: int) -> Tensor | None:
    half = 2 ** (bits - 1)
    if multiples.min() < -half or multiples.max() > half - 1:
        return None
    if bits == 8:
        stored = scale.half().view(-1, 1).view(torch.uint8)
        return torch.cat([stored, multiples.to(torch.int8).view(torch.uint8)], 1)
    return (pack_nibbles if bits == 4 else pack_five)([scale], multiples + half)


def _mxfp4(q: QuantizedTensor) -> Tensor:
    columns = q.codes.shape[1] // q.scale.shape[1]
    exponent = q.scale.view(torch.uint8).repeat_interleave(columns // BLOCK, 1)  # of two, plus 127
    codes = torch.where(q.codes < 0, 8 - q.codes, q.codes).view(-1, 2, BLOCK // 2).to(torch.uint8)
    return torch.cat([exponent.reshape(-1, 1), codes[:, 0] | codes[:, 1] << 4], 1)


def _with_minimum(multiples: Tensor, scale: Tensor, bits: int) -> Tensor | None:
    last = 2**bits - 1
    low, high = multiples.amin(1), multiples.amax(1)
    if (high - low).max() > last:
        return None
    first, exact = low, torch.zeros_like(low, dtype=torch.bool)
    for below in range(last + 1):
        candidate = low - below
        product = scale * candidate
        fits = (high - candidate <= last) & (product.half().float() == product) & ~exact
        first, exact = torch.where(fits, candidate, first), exact | fits
    return (pack_nibbles if bits == 4 else pack_five)([scale, scale * first], multiples - first[:, None])
