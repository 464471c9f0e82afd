"""Codes of 1 to 8 bits in 32-bit words: a little-endian bit stream, 32 codes in as many words as a code has bits.

GPTQ and AWQ store their codes like this. A code of 3 bits may lie across two words; those of 2, 4 and 8 never do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack the rows of ``codes`` ``(rows, count)``, ``0`` to ``2^bits - 1``, to int32 ``(rows, ceil(count bits / 32))``."""
    rows, count = codes.shape
    periods = pad(codes.to(torch.int32), (0, -count % 32)).view(rows, -1, 32)
    words = torch.zeros(rows, periods.shape[1], bits, dtype=torch.int32)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        words[..., word] |= periods[..., place] << shift
        if shift + bits > 32:
            words[..., word + 1] |= periods[..., place] >> (32 - shift)
    return words.view(rows, -1)[:, : -(-count * bits // 32)].contiguous()


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack what :func:`pack_words` packed: uint8 codes ``(rows, count)``.

    Works place by place of a period of 32 codes, so that it needs little more memory than its result.
    """
    rows = words.shape[0]
    periods = pad(words, (0, -words.shape[1] % bits)).view(rows, -1, bits)
    codes = torch.empty(rows, periods.shape[1], 32, dtype=torch.uint8)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        value = periods[..., word] >> shift
        if shift + bits > 32:
            here = (
                32 - shift
            )  # bits of the code in its first word; the shift filled those above with the sign
            value = (value & (2**here - 1)) | (periods[..., word + 1] << here)
        codes[..., place] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.view(rows, -1)[:, :count]
