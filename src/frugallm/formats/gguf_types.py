"""The block types of GGUF: how a row of weights becomes blocks of codes with scales, for all of a tensor at once.

A row is cut into blocks of 32 entries, for the K types of 256. ``d`` and ``m`` are float16, ``q``, ``s`` and ``b`` integers:

=================== ===================== ===============================================================================
type                value of an entry     stored
=================== ===================== ===============================================================================
Q4_0, Q5_0, Q8_0    ``d q``               ``d`` per block; ``q`` of 4, 5 and 8 bits, signed
Q4_1, Q5_1          ``d q + m``           ``d``, ``m`` per block; ``q`` of 4 and 5 bits, from 0
IQ4_NL              ``d T[q]``            as Q4_0, with 16 values ``T`` that lie denser around zero
MXFP4               ``2^e T[q]``          as Q4_0, with a whole ``e`` of 8 bits and the 16 values of FP4
Q2_K, Q4_K, Q5_K    ``d s q - m b``       ``d``, ``m`` per block; ``s``, ``b`` per part of it (16 parts of 16 entries with 4
                                          bits each, or 8 parts of 32 with 6 bits); ``q`` of 2, 4 and 5 bits, from 0
Q3_K, Q6_K          ``d s q``             ``d`` per block; ``s`` of 6 and 8 bits for each of 16 parts; ``q`` of 3 and 6
                                          bits, both signed
=================== ===================== ===============================================================================

*How codes are chosen.* The plain choice puts the largest magnitude on the last code, the range on all codes. That
spends the grid on outliers. Here many steps around the plain one are tried; for the codes that each gives, the scale (and
minimum) of least weighted squared error has a closed form; the best is kept, rounded to float16, and *then* the codes are
computed. The plain choice is among the candidates, so no block comes out worse than with it. The weights are the
importance of the input channels: with their mean squares over a calibration text, the error that counts is that of the
layer's output as far as channels are uncorrelated; without, all channels count alike. Scales of parts are fitted in
the same way a second time, to their own grid.

F32, F16, BF16 and Q8_0 leave nothing to choose, and MXFP4 little: they are written by the ``gguf`` package. The layouts are
those of its ``gguf.quants``, whose ``dequantize`` defines here what stored bytes mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL, dequantize, quantize
from torch import Tensor

#: Types that a file may be asked for, from large to small.
TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL"),
    *("MXFP4", "Q3_K", "Q2_K"),
)
PLAIN = ("F32", "F16", "BF16", "Q8_0")
#: Written by the ``gguf`` package.
BY_PACKAGE = (*PLAIN, "MXFP4")
#: What llama.cpp takes where a row is no multiple of a type's block.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
LARGEST_HALF = 65504.0

_ENTRIES_AT_ONCE = 2**18  # what the candidates of so many leave behind stays in the processor's cache
_CANDIDATES = 19
_STEPS_AROUND_RANGE = torch.linspace(-1, 1, 17).tolist()
_TABLE = torch.tensor(IQ4_NL.kvalues, dtype=torch.float32)
# Halfway between two of its values lies a whole number of halves, so that its nearest value can be looked up by halves.
_HALVES = torch.arange(2 * float(_TABLE[0]), 2 * float(_TABLE[-1]) + 1) / 2 + 0.25
_NEAREST = torch.bucketize(_HALVES, (_TABLE[1:] + _TABLE[:-1]) / 2)


def block_size(kind: str) -> tuple[int, int]:
    """Return entries and bytes of one block of a type."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def fitting_type(kind: str, width: int) -> str:
    """Return ``kind``, or what takes its place in rows of ``width`` entries, which its block does not divide."""
    while width % block_size(kind)[0]:
        kind = FALLBACKS.get(kind, "F16")
    return kind


def encode(weight: Tensor, kind: str, importance: Tensor | None = None) -> np.ndarray:
    """Store a weight in a type.

    Parameters
    ----------
    weight
        ``(rows, width)`` float32; ``width`` is a multiple of the type's block.
    kind
        One of :data:`TYPES`.
    importance
        ``(width,)`` weights of the squared error, for instance the mean square of each input channel.

    Returns
    -------
    numpy.ndarray
        ``(rows, bytes)`` uint8.
    """
    rows, width = weight.shape
    if kind in BY_PACKAGE:
        stored = quantize(weight.numpy(), GGMLQuantizationType[kind])
        return np.ascontiguousarray(stored).view(np.uint8).reshape(rows, -1)
    entries, size = block_size(kind)
    cost = _cost(importance, width)
    out = np.empty((rows, width // entries * size), np.uint8)
    step = max(1, _ENTRIES_AT_ONCE // width)
    for start in range(0, rows, step):
        piece = weight[start : start + step]
        x = piece.reshape(-1, entries)
        w = cost.expand(len(piece), width).reshape(-1, entries)
        out[start : start + step] = ENCODERS[kind](x, w).numpy().reshape(len(piece), -1)
    return out


def decode(stored: np.ndarray, kind: str) -> Tensor:
    """Return the values ``(rows, width)`` float32 of stored rows ``(rows, bytes)``, as the ``gguf`` package reads them."""
    with np.errstate(all="ignore"):  # whoever decodes checks what comes out
        values = dequantize(stored, GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(values, dtype=np.float32, copy=not values.flags.owndata))


def _cost(importance: Tensor | None, width: int) -> Tensor:
    """Return weights of the squared error ``(1, width)``: of mean one, and nowhere so small that sums vanish."""
    mean = None if importance is None else importance.float().mean()
    if importance is None or not mean:
        return torch.ones(1, width)
    return (importance.float() / mean).clamp(min=1e-4)[None]


# -- choosing scales. Values x and weights w lie as (entries, blocks): sums over a block run along whole rows -----------


@dataclass(frozen=True)
class Grid:
    """Values that codes stand for, before the scale.

    Attributes
    ----------
    anchor
        Where the plain choice puts the value of largest magnitude.
    reach
        How far from ``anchor`` candidates put it.
    nearest
        Nearest grid values; may change its argument.
    """

    anchor: float
    reach: float
    nearest: Callable[[Tensor], Tensor]


def integers(low: int, high: int) -> Grid:
    """Return the grid of the integers from ``low`` to ``high``."""
    return Grid(low or high, 0.9, lambda x: x.round_().clamp_(low, high))


def nearest_code(x: Tensor) -> Tensor:
    """Return where in the table of IQ4_NL the value nearest to each entry is; may change its argument."""
    place = x.mul_(2).floor_().sub_(2 * float(_TABLE[0])).clamp_(0, len(_NEAREST) - 1)
    return _NEAREST.take(place.long())


NON_LINEAR = Grid(float(_TABLE[0]), 12.0, lambda x: _TABLE.take(nearest_code(x)))


def inverse(scale: Tensor) -> Tensor:
    """Return ``1 / scale``, and 0 for 0."""
    return torch.where(scale == 0, 0, 1 / scale)


def half(scale: Tensor) -> Tensor:
    """Round to float16."""
    return scale.half().float()


def fit_scale(
    x: Tensor, w: Tensor, grid: Grid, rounded: Callable[[Tensor], Tensor] = half
) -> tuple[Tensor, Tensor]:
    """Choose the scale of every block, and its grid values.

    Parameters
    ----------
    x, w
        Values and weights, ``(entries, blocks)`` float32.
    rounded
        What becomes of a scale when it is stored.

    Returns
    -------
    tuple
        ``scale (1, blocks)`` as stored, and grid values ``(entries, blocks)``, such that ``x`` is about their product.
    """
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True))
    plain = extreme / grid.anchor
    wx = w * x
    best, scale = torch.zeros_like(plain), plain
    for shift in torch.linspace(-grid.reach, grid.reach, _CANDIDATES).tolist():
        q = grid.nearest(x * inverse(extreme / (grid.anchor + shift)))
        along, square = (wx * q).sum(0, keepdim=True), (w * q * q).sum(0, keepdim=True)
        gain = along.square() * inverse(square)  # by so much the error falls below that of zeros
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, along * inverse(square), scale)
    found = []
    for candidate in (rounded(plain), rounded(scale)):
        q = grid.nearest(x * inverse(candidate))
        found.append((candidate, q, (w * (candidate * q - x).square()).sum(0, keepdim=True)))
    (first, q_first, error_first), (second, q_second, error_second) = found
    better = error_second < error_first
    return torch.where(better, second, first), torch.where(better, q_second, q_first)


def fit_range(
    x: Tensor,
    w: Tensor,
    high: int,
    *,
    through_zero: bool = False,
    rounded: Callable[[Tensor], Tensor] = half,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose scale and minimum of every block for codes from 0 to ``high``.

    Parameters
    ----------
    x, w
        Values and weights, ``(entries, blocks)`` float32.
    through_zero
        Minima are not positive: their own codes have no sign.

    Returns
    -------
    tuple
        ``scale`` and ``minimum``, ``(1, blocks)`` as stored, and codes ``(entries, blocks)``.
    """
    low = x.amin(0, keepdim=True)
    if through_zero:
        low = low.clamp(max=0)
    span = x.amax(0, keepdim=True) - low
    wx = w * x
    total, along_ones = w.sum(0, keepdim=True), wx.sum(0, keepdim=True)
    best, scale, minimum = torch.full_like(low, torch.inf), span / high, low
    for shift in _STEPS_AROUND_RANGE:
        q = ((x - low) * inverse(span / (high + shift))).round_().clamp_(0, high)
        wq = w * q
        ones, square = wq.sum(0, keepdim=True), (wq * q).sum(0, keepdim=True)
        along = (wx * q).sum(0, keepdim=True)
        over = inverse(total * square - ones.square())
        s, m = (total * along - ones * along_ones) * over, (square * along_ones - ones * along) * over
        if through_zero:
            s, m = torch.where(m > 0, along * inverse(square), s), m.clamp(max=0)
        error = (w * (s * q + m - x).square()).sum(0, keepdim=True)
        better = (error < best) & (s > 0)
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, s, scale), torch.where(better, m, minimum)
    found = []
    for s, m in ((span / high, low), (scale, minimum)):
        s, m = rounded(s), rounded(m)
        q = ((x - m) * inverse(s)).round_().clamp_(0, high)
        found.append((s, m, q, (w * (s * q + m - x).square()).sum(0, keepdim=True)))
    better = found[1][3] < found[0][3]
    s, m, q = (torch.where(better, second, first) for first, second in zip(found[0][:3], found[1][:3]))
    return s, m, q


def _unrounded(scale: Tensor) -> Tensor:
    return scale


def _parts(x: Tensor, parts: int) -> Tensor:
    """View blocks ``(blocks, entries)`` as ``(entries of a part, blocks * parts)``."""
    return x.reshape(len(x) * parts, -1).T.contiguous()


# -- packing. Codes are integers; the result is (blocks, bytes) uint8 ---------------------------------------------------


def _bytes(values: Tensor) -> Tensor:
    """Return float16 numbers ``(blocks,)`` as bytes ``(blocks, 2)``."""
    return values.half().reshape(-1, 1).view(torch.uint8)


def _fields(codes: Tensor, bits: int) -> Tensor:
    """Join ``(…, fields, n)`` small integers to bytes ``(…, n)``; field ``i`` lies at bit ``i * bits``."""
    shifts = torch.arange(codes.shape[-2], dtype=torch.int32)[:, None] * bits
    return (codes.to(torch.int32) << shifts).sum(-2).to(torch.uint8)


def pack_nibbles(scales: Sequence[Tensor], codes: Tensor) -> Tensor:
    """Pack Q4_0, Q4_1 and IQ4_NL: ``scales`` each ``(blocks,)``, ``codes (blocks, 32)`` from 0 to 15."""
    low = _fields(codes.view(-1, 2, 16), 4)
    return torch.cat([*map(_bytes, scales), low], 1)


def pack_five(scales: Sequence[Tensor], codes: Tensor) -> Tensor:
    """Pack Q5_0 and Q5_1: ``scales`` each ``(blocks,)``, ``codes (blocks, 32)`` from 0 to 31."""
    codes = codes.to(torch.int32)
    low = _fields((codes & 15).view(-1, 2, 16), 4)
    fifth = _fields((codes >> 4).view(-1, 4, 8).transpose(1, 2), 1)
    return torch.cat([*map(_bytes, scales), fifth, low], 1)


def _pack_scales_and_minima(s: Tensor, b: Tensor) -> Tensor:
    """Pack two times eight numbers of 6 bits, ``(blocks, 8)`` each, into 12 bytes."""
    s, b = s.to(torch.int32), b.to(torch.int32)
    high = [v[:, :4] | (v[:, 4:] >> 4) << 6 for v in (s, b)]
    return torch.cat([*high, (s[:, 4:] & 15) | (b[:, 4:] & 15) << 4], 1).to(torch.uint8)


def pack_q4_k(d: Tensor, m: Tensor, s: Tensor, b: Tensor, q: Tensor) -> Tensor:
    """Pack Q4_K: ``d``, ``m`` ``(blocks,)``, ``s``, ``b`` ``(blocks, 8)`` from 0 to 63, ``q (blocks, 256)`` to 15."""
    low = _fields(q.view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([_bytes(d), _bytes(m), _pack_scales_and_minima(s, b), low], 1)


def pack_q5_k(d: Tensor, m: Tensor, s: Tensor, b: Tensor, q: Tensor) -> Tensor:
    """Pack Q5_K: as Q4_K, with ``q`` from 0 to 31."""
    q = q.to(torch.int32)
    fifth = _fields((q >> 4).view(-1, 8, 32), 1)
    low = _fields((q & 15).view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([_bytes(d), _bytes(m), _pack_scales_and_minima(s, b), fifth, low], 1)


def pack_q2_k(d: Tensor, m: Tensor, s: Tensor, b: Tensor, q: Tensor) -> Tensor:
    """Pack Q2_K: ``d``, ``m`` ``(blocks,)``, ``s``, ``b`` ``(blocks, 16)`` from 0 to 15, ``q (blocks, 256)`` to 3."""
    scales = _fields(torch.stack([s, b], 1), 4)
    return torch.cat([scales, _fields(q.view(-1, 2, 4, 32), 2).flatten(1), _bytes(d), _bytes(m)], 1)


def pack_q3_k(d: Tensor, s: Tensor, q: Tensor) -> Tensor:
    """Pack Q3_K: ``d (blocks,)``, ``s (blocks, 16)`` from -32 to 31, ``q (blocks, 256)`` from -4 to 3."""
    s, q = s.to(torch.int32) + 32, q.to(torch.int32) + 4
    third = _fields((q >> 2).view(-1, 8, 32), 1)
    low = _fields((q & 3).view(-1, 2, 4, 32), 2).flatten(1)
    scales = [_fields((s & 15).view(-1, 2, 8), 4), _fields((s >> 4).view(-1, 4, 4), 2)]
    return torch.cat([third, low, *scales, _bytes(d)], 1)


def pack_q6_k(d: Tensor, s: Tensor, q: Tensor) -> Tensor:
    """Pack Q6_K: ``d (blocks,)``, ``s (blocks, 16)`` from -128 to 127, ``q (blocks, 256)`` from -32 to 31."""
    q = q.to(torch.int32) + 32
    low = _fields((q & 15).view(-1, 2, 2, 64), 4).flatten(1)
    high = _fields((q >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([low, high, s.to(torch.int8).view(torch.uint8), _bytes(d)], 1)


# -- one function per kind of type: blocks x and weights w (blocks, entries) to bytes -----------------------------------


def _signed(low: int, pack: Callable[[Sequence[Tensor], Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
    d, q = fit_scale(x.T.contiguous(), w.T.contiguous(), integers(low, -low - 1))
    return pack([d[0]], q.T.contiguous() - low)


def _with_minimum(
    high: int, pack: Callable[[Sequence[Tensor], Tensor], Tensor], x: Tensor, w: Tensor
) -> Tensor:
    d, m, q = fit_range(x.T.contiguous(), w.T.contiguous(), high)
    return pack([d[0], m[0]], q.T.contiguous())


def _non_linear(x: Tensor, w: Tensor) -> Tensor:
    d, values = fit_scale(x.T.contiguous(), w.T.contiguous(), NON_LINEAR)
    return pack_nibbles([d[0]], nearest_code(values.T.contiguous()))


def _signed_parts(
    low: int, low_scale: int, pack: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, w: Tensor
) -> Tensor:
    grid, xs, ws = integers(low, -low - 1), _parts(x, 16), _parts(w, 16)
    fitted, _ = fit_scale(xs, ws, grid, _unrounded)
    weights = ws.sum(0).view(-1, 16).T.contiguous()
    d, s = fit_scale(fitted.view(-1, 16).T.contiguous(), weights, integers(low_scale, -low_scale - 1))
    step = (d * s).T.reshape(1, -1)
    q = grid.nearest(xs * inverse(step))
    return pack(d[0], s.T.contiguous(), q.T.reshape(len(x), -1))


def _parts_with_minimum(
    high: int,
    parts: int,
    high_scale: int,
    pack: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    w: Tensor,
) -> Tensor:
    xs, ws = _parts(x, parts), _parts(w, parts)
    fitted, minimum, _ = fit_range(xs, ws, high, through_zero=True, rounded=_unrounded)
    weights, grid = ws.sum(0).view(-1, parts).T.contiguous(), integers(0, high_scale)
    d, s = fit_scale(fitted.view(-1, parts).T.contiguous(), weights, grid)
    m, b = fit_scale(-minimum.view(-1, parts).T.contiguous(), weights, grid)
    step, below = (d * s).T.reshape(1, -1), (m * b).T.reshape(1, -1)
    q = ((xs + below) * inverse(step)).round_().clamp_(0, high)
    return pack(d[0], m[0], s.T.contiguous(), b.T.contiguous(), q.T.reshape(len(x), -1))


ENCODERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Q4_0": lambda x, w: _signed(-8, pack_nibbles, x, w),
    "Q5_0": lambda x, w: _signed(-16, pack_five, x, w),
    "Q4_1": lambda x, w: _with_minimum(15, pack_nibbles, x, w),
    "Q5_1": lambda x, w: _with_minimum(31, pack_five, x, w),
    "IQ4_NL": _non_linear,
    "Q2_K": lambda x, w: _parts_with_minimum(3, 16, 15, pack_q2_k, x, w),
    "Q4_K": lambda x, w: _parts_with_minimum(15, 8, 63, pack_q4_k, x, w),
    "Q5_K": lambda x, w: _parts_with_minimum(31, 8, 63, pack_q5_k, x, w),
    "Q3_K": lambda x, w: _signed_parts(-4, -32, pack_q3_k, x, w),
    "Q6_K": lambda x, w: _signed_parts(-32, -128, pack_q6_k, x, w),
}
