"""The 8-bit format of bitsandbytes, as ``transformers`` saves and loads it: what ``llm_int8`` is handed on in.

====================== ==============================================================================================
tensor                 meaning
====================== ==============================================================================================
``<p>.weight``         int8 codes ``(out, in)``
``<p>.SCB``            float32 ``(out,)``: the magnitude that code 127 stands for, so ``weight = codes SCB / 127``
``<p>.weight_format``  uint8 scalar 0: codes lie row by row
====================== ==============================================================================================

``config.json`` says one threshold for all linears, and which modules are left as they are. Inputs are rounded per
token at run time, channels that reach the threshold in any token excepted; nothing is stored about them. The format has
no compressed embedding: tables are written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frugallm.errors import ExportError
from frugallm.formats.folder import write_model
from frugallm.formats.quantized_tensor import LinearScheme, QuantizedTensor

if TYPE_CHECKING:
    from frugallm.formats.decoded import Decoded


def encode_linear(path: str, q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors, by full name, that store linear ``path``; ``q`` has one scale a row."""
    return {
        f"{path}.weight": q.codes.contiguous(),
        f"{path}.SCB": q.scale[:, 0].float() * 127,
        f"{path}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def quantization_config(threshold: float, skipped: list[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": threshold,
        "llm_int8_skip_modules": skipped,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def write(source: Decoded, folder: Path) -> None:
    """Write a result of ``llm_int8`` in this format.

    Raises
    ------
    ExportError
        If a linear is stored in a way that the format cannot hold; nothing is written.
    """
    family = source.family
    linears = source.linears()
    schemes = {path: scheme for path in linears if (scheme := source.scheme(path)) is not None}
    threshold = _threshold(source, schemes)
    dtype = getattr(torch, source.dtype)

    def encode(name: str, value: Tensor) -> Mapping[str, Tensor]:
        path = name.removesuffix(".weight")
        q = source.quantized(path) if name != path and path in schemes else None
        return {name: value.to(dtype)} if q is None else encode_linear(path, q)

    skipped = [family.head, *(path for path in linears if path not in schemes)]
    write_model(source, folder, dtype, encode, quantization_config(threshold, skipped))


def _threshold(source: Decoded, schemes: Mapping[str, LinearScheme]) -> float:
    """Return the one threshold of all linears, each of which must be as ``llm_int8`` stores it."""
    found: dict[float, str] = {}
    for path, scheme in schemes.items():
        weights, inputs = scheme.weights, scheme.activations
        int8 = weights.bits == 8 and weights.symmetric and weights.group_size is None and not weights.extras
        int8 = int8 and weights.grid == "int"
        if not int8 or inputs is None or inputs.bits != 8 or inputs.outliers is None:
            raise ExportError(
                f"{source.path}: the bitsandbytes format cannot hold {path} ({scheme.label()})",
                "It holds results of llm_int8 with a threshold above 0; others can be written with --to dense",
            )
        found.setdefault(inputs.outliers, path)
    if len(found) > 1:
        (one, a), (two, b) = list(found.items())[:2]
        raise ExportError(
            f"{source.path}: the bitsandbytes format has one threshold, {a} has {one:g} and {b} {two:g}",
            "Make it again with one threshold",
        )
    if not found:
        raise ExportError(f"{source.path} has no linear in 8 bits", "Write it with --to dense")
    return next(iter(found))
