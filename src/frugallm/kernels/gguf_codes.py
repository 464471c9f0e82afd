"""Codes of a GGUF file's types, as the kernels take them; nothing is fitted again.

What the types store is in :mod:`frugallm.formats.gguf_types`. Every value is a whole number times a scale, plus a least
value where the type has one. Scales of parts of a block are products of a half and of a whole number of at most 8 bits,
which float32 holds.

==================== ===================== ============= ==================================================
type                 codes                 group         scale, least value
==================== ===================== ============= ==================================================
Q4_0, Q5_0, Q8_0     signed                32            ``d``
Q4_1, Q5_1           from 0                32            ``d``, ``m``
IQ4_NL, IQ4_XS       those of its table    32            ``d``, ``d s``
MXFP4, NVFP4         twice the value       32, 16        half of the power of two, of the float of 8 bits
Q2_K, Q4_K, Q5_K     from 0                16, 32, 32    ``d s``, ``-m b``
Q3_K, Q6_K           signed                16            ``d s``
==================== ===================== ============= ==================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL, MXFP4, NVFP4, Q4_K

from frugallm.kernels.packing import Codes

#: Codes ``(…, entries)`` of blocks ``(rows, blocks, bytes)``, scales and least values ``(…, parts)`` float16 or float32.
Read = tuple[np.ndarray, np.ndarray, np.ndarray | None]
LEVELS = np.array(IQ4_NL.kvalues, np.int8)
DOUBLED = np.array(MXFP4.kvalues, np.int8)


@dataclass(frozen=True)
class Layout:
    """How a type is read: bits of a code, entries that share a scale, and what takes its blocks apart."""

    bits: int
    group: int
    read: Callable[[np.ndarray], Read]


def gguf_codes(kind: str, raw: np.ndarray) -> Codes | None:
    """Return the codes of rows of bytes ``(rows, bytes)``; ``None``: the kernels do not have that type.

    Parameters
    ----------
    kind
        Name of the type, ``"Q4_0"``.
    raw
        uint8.
    """
    if kind not in TYPES:
        return None
    layout, (_, size) = TYPES[kind], GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    with np.errstate(all="ignore"):  # whoever asks checks that scales are finite
        found = layout.read(np.ascontiguousarray(raw).reshape(len(raw), -1, size))
    codes, scales, least = (
        None if x is None else torch.from_numpy(np.ascontiguousarray(x.reshape(len(raw), -1))) for x in found
    )
    assert codes is not None and scales is not None
    return Codes(codes, scales, least, layout.bits, layout.group)


def _cut(blocks: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """Return the parts of blocks, of so many bytes each; the last one takes the rest."""
    return np.split(blocks, np.cumsum(sizes), -1)


def _halves(part: np.ndarray) -> np.ndarray:
    return part.copy().view(np.float16)


def _fields(part: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Take bytes ``(…, n)`` apart: of each run of bytes the lowest bits, one after the other, then the next."""
    runs = part.reshape(*part.shape[:-1], -1, 1, run) >> np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (runs & np.uint8(2**bits - 1)).reshape(*part.shape[:-1], -1)


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    return codes.astype(np.int8) - np.int8(2 ** (bits - 1))


def _times(d: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return the scales of parts: a half a block, times whole numbers."""
    return d.astype(np.float32) * whole.astype(np.float32)


# -- one function per kind of type: blocks (rows, blocks, bytes) ---------------------------------------------------------


def _four(blocks: np.ndarray) -> Read:
    d, low = _cut(blocks, 2)
    return _signed(_fields(low, 4, 16), 4), _halves(d), None


def _four_with_minimum(blocks: np.ndarray) -> Read:
    d, m, low = _cut(blocks, 2, 2)
    return _fields(low, 4, 16), _halves(d), _halves(m)


def _five(fifth: np.ndarray, low: np.ndarray) -> np.ndarray:
    return _fields(low, 4, 16) | np.unpackbits(fifth, axis=-1, bitorder="little") << 4


def _five_signed(blocks: np.ndarray) -> Read:
    d, fifth, low = _cut(blocks, 2, 4)
    return _signed(_five(fifth, low), 5), _halves(d), None


def _five_with_minimum(blocks: np.ndarray) -> Read:
    d, m, fifth, low = _cut(blocks, 2, 2, 4)
    return _five(fifth, low), _halves(d), _halves(m)


def _eight(blocks: np.ndarray) -> Read:
    d, codes = _cut(blocks, 2)
    return codes.copy().view(np.int8), _halves(d), None


def _iq4_nl(blocks: np.ndarray) -> Read:
    d, low = _cut(blocks, 2)
    return LEVELS[_fields(low, 4, 16)], _halves(d), None


def _iq4_xs(blocks: np.ndarray) -> Read:
    d, high, low, codes = _cut(blocks, 2, 2, 4)
    # Four bits of each scale lie pair by pair in `low`, two more one after the other in `high`.
    scales = _fields(low, 4, 1) | _fields(high, 2, 1) << 4
    return LEVELS[_fields(codes, 4, 16)], _times(_halves(d), _signed(scales, 6)), None


def _mxfp4(blocks: np.ndarray) -> Read:
    exponent, low = _cut(blocks, 1)
    return DOUBLED[_fields(low, 4, 16)], MXFP4.e8m0_to_fp32_half(exponent), None


def _nvfp4(blocks: np.ndarray) -> Read:
    scales, low = _cut(blocks, 4)
    return DOUBLED[_fields(low, 4, 8)], NVFP4.ue4m3_to_fp32(scales).astype(np.float32), None


def _q2_k(blocks: np.ndarray) -> Read:
    parts, low, d, m = _cut(blocks, 16, 64, 2)
    return _fields(low, 2, 32), _times(_halves(d), parts & 15), -_times(_halves(m), parts >> 4)


def _q3_k(blocks: np.ndarray) -> Read:
    third, low, parts, high, d = _cut(blocks, 32, 64, 8, 4)
    scales = _fields(parts, 4, 8) | _fields(high, 2, 4) << 4
    codes = _fields(low, 2, 32) | _fields(third, 1, 32) << 2
    return _signed(codes, 3), _times(_halves(d), _signed(scales, 6)), None


def _parts_with_minimum(d: np.ndarray, m: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales, minima = (x.reshape(*parts.shape[:-1], 8) for x in Q4_K.get_scale_min(parts.reshape(-1, 12)))
    return _times(_halves(d), scales), -_times(_halves(m), minima)


def _q4_k(blocks: np.ndarray) -> Read:
    d, m, parts, low = _cut(blocks, 2, 2, 12)
    return _fields(low, 4, 32), *_parts_with_minimum(d, m, parts)


def _q5_k(blocks: np.ndarray) -> Read:
    d, m, parts, fifth, low = _cut(blocks, 2, 2, 12, 32)
    return _fields(low, 4, 32) | _fields(fifth, 1, 32) << 4, *_parts_with_minimum(d, m, parts)


def _q6_k(blocks: np.ndarray) -> Read:
    low, high, scales, d = _cut(blocks, 128, 64, 16)
    codes = _fields(low, 4, 64) | _fields(high, 2, 32) << 4
    return _signed(codes, 6), _times(_halves(d), scales.copy().view(np.int8)), None


TYPES = {
    "Q4_0": Layout(4, 32, _four),
    "Q4_1": Layout(4, 32, _four_with_minimum),
    "Q5_0": Layout(5, 32, _five_signed),
    "Q5_1": Layout(5, 32, _five_with_minimum),
    "Q8_0": Layout(8, 32, _eight),
    "IQ4_NL": Layout(8, 32, _iq4_nl),
    "IQ4_XS": Layout(8, 32, _iq4_xs),
    "MXFP4": Layout(5, 32, _mxfp4),
    "NVFP4": Layout(5, 16, _nvfp4),
    "Q2_K": Layout(2, 16, _q2_k),
    "Q3_K": Layout(3, 16, _q3_k),
    "Q4_K": Layout(4, 32, _q4_k),
    "Q5_K": Layout(5, 32, _q5_k),
    "Q6_K": Layout(6, 16, _q6_k),
}
