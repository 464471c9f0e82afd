"""The ``bitnet`` layout of ``transformers``, and ours of one bit: ternary or binary weights with one scale a matrix.

============= ============================================================================================================
``quant_method`` tensors of a linear ``<p>``
============= ============================================================================================================
bitnet        ``weight`` uint8 ``(out / 4, in)``: bits ``2i`` and ``2i + 1`` hold code + 1 of rows ``[i out/4, (i+1) out/4)``;
              ``weight_scale (1,)``; with a norm inside, its gains ``rms_norm.weight (in,)``
frugallm-     ``weight`` uint8 ``(out / 8, in)``: bit ``i`` is set where the code of rows ``[i out/8, (i+1) out/8)`` is +1 and
bitnet        not -1; else as above, in ``frugallm.safetensors``
============= ============================================================================================================

What ``weight_scale`` means depends on ``linear_class``: ``bitlinear`` divides by it (it is the inverse of mean ``|W|``),
``autobitlinear`` multiplies, the bias as well. The former is written; both are read. With transformers 5.23 on a CPU packed
weights for ``autobitlinear`` come out in float32 whatever the type of the model, which then fails in any other.

Inputs are normalized if ``use_rms_norm`` says so, and rounded to 8 bits with one scale a token.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme

METHOD, ONE_BIT = "bitnet", "frugallm-bitnet"
#: Codes are -1, 0 and 1, or -1 and 1; the scale is that of the whole matrix, once for each row.
SCHEME = WeightScheme(bits=2, scale_dtype="float32")
EPS = 1e-5


def round_tokens(x: Tensor) -> Tensor:
    """Return ``x (..., in)`` rounded to 8 bits, one scale a token: 127 codes cover its largest magnitude."""
    scale = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=EPS)
    return ((x.float() * scale).round_().clamp_(-128, 127) / scale).to(x.dtype)


def normalize(x: Tensor, gains: Tensor, eps: float) -> Tensor:
    """Return ``x (..., in)`` divided by its root mean square, times ``gains (in,)``."""
    return F.rms_norm(x.float(), x.shape[-1:], gains.float(), eps).to(x.dtype)


def stored_scale(mean: Tensor) -> Tensor:
    """Return the scale ``()`` float32 that a mean magnitude becomes once its inverse is stored in bf16."""
    return 1 / (1 / mean.float().clamp(min=EPS)).bfloat16().float()


def pack(codes: Tensor, bits: Literal[1, 2]) -> Tensor:
    """Return codes ``(out, in)`` in ``(out bits / 8, in)`` uint8; ``out`` must be a multiple of ``8 / bits``."""
    fields = 8 // bits
    unsigned = ((codes + 1) if bits == 2 else (codes + 1) // 2).to(torch.uint8)
    packed = torch.zeros(len(codes) // fields, codes.shape[1], dtype=torch.uint8)
    for i, rows in enumerate(unsigned.view(fields, -1, codes.shape[1])):
        packed |= rows << (bits * i)
    return packed


def unpack(packed: Tensor, bits: Literal[1, 2]) -> Tensor:
    """Return what :func:`pack` packed, ``(out, in)`` int8."""
    fields = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    unsigned = torch.cat(fields).to(torch.int8)
    return unsigned - 1 if bits == 2 else 2 * unsigned - 1


def encode_linear(path: str, q: QuantizedTensor, bits: Literal[1, 2]) -> dict[str, Tensor]:
    """Return the tensors, by full name, that store the weight of linear ``path``."""
    inverse = (1 / q.scale.flatten()[:1].float()).bfloat16()
    return {f"{path}.weight": pack(q.codes, bits), f"{path}.weight_scale": inverse}


def quantization_config(bits: Literal[1, 2], norm_eps: float | None, ignore: list[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``; ``norm_eps``: of the norm inside, if there is one."""
    return {
        "quant_method": METHOD if bits == 2 else ONE_BIT,
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "use_rms_norm": norm_eps is not None,
        "rms_norm_eps": 1e-6 if norm_eps is None else norm_eps,
        "modules_to_not_convert": ignore,
    }
