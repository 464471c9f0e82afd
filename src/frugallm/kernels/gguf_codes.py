"""Codes of a GGUF file's plain types, as the kernels take them; nothing is fitted again.

============ ========================================================== ============
type         bytes of a block of 32 weights                             weight
============ ========================================================== ============
Q4_0         ``d`` float16, 16 bytes of two codes                       d (q - 8)
Q4_1         ``d``, ``m`` float16, 16 bytes of two codes                d q + m
Q5_0         ``d`` float16, fifth bits uint32, 16 bytes of two codes    d (q - 16)
Q5_1         ``d``, ``m`` float16, fifth bits, 16 bytes of two codes    d q + m
Q8_0         ``d`` float16, 32 int8                                     d q
============ ========================================================== ============

Two codes in a byte: the low half is that of weight ``i``, the high half that of weight ``16 + i``.
"""

from __future__ import annotations

import numpy as np
import torch

from frugallm.kernels.packing import Codes

BLOCK = 32
#: Bits of a code, and whether a block has a minimum.
TYPES = {"Q4_0": (4, False), "Q4_1": (4, True), "Q5_0": (5, False), "Q5_1": (5, True), "Q8_0": (8, False)}


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
    bits, minimum = TYPES[kind]
    numbers = 4 if minimum else 2
    size = numbers + (4 if bits == 5 else 0) + (32 if bits == 8 else 16)
    blocks = np.ascontiguousarray(raw).reshape(len(raw), -1, size)
    scales = blocks[..., :numbers].copy().view(np.float16)
    body = blocks[..., numbers:]
    if bits == 8:
        codes = body.copy().view(np.int8)
    else:
        halves = body[..., -16:]
        codes = np.concatenate((halves & 15, halves >> 4), -1)
        if bits == 5:
            codes = codes | np.unpackbits(body[..., :4], axis=-1, bitorder="little") << 4
        if not minimum:
            codes = codes.astype(np.int8) - 2 ** (bits - 1)
    least = torch.from_numpy(scales[..., 1].copy()) if minimum else None
    flat = torch.from_numpy(np.ascontiguousarray(codes.reshape(len(raw), -1)))
    return Codes(flat, torch.from_numpy(scales[..., 0].copy()), least, bits, BLOCK)
