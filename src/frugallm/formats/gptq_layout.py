"""The GPTQ layout, as AutoGPTQ and GPTQModel write it.

Tensors of a linear ``(out, in)`` with codes of ``b`` bits; words are int32, see :mod:`frugallm.formats.words`:

========= =========================== ================================================================================
qweight   ``(in b / 32, out)`` words  unsigned codes, packed down the columns of the stored matrix, that is along ``in``
qzeros    ``(groups, out b / 32)``    zero points, packed along ``out``
          words
scales    ``(groups, out)`` float16   the value is ``scale * (code - zero)``
g_idx     ``(in,)`` int32             the group of each input column; left out: consecutive groups
========= =========================== ================================================================================

The first version (``checkpoint_format: gptq``) stores zero points less one, ``gptq_v2`` as they are. A zero point of 0
has no place in the first version: its field runs out and borrows from the next one, so adding one to the whole word
brings it back, which is what GPTQModel does; with 3 bits it adds to each field.

References
----------
https://github.com/ModelCloud/GPTQModel, ``gptqmodel/nn_modules/qlinear`` and ``convert_gptq_v1_to_v2_format``.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor

from frugallm.errors import ModelError
from frugallm.formats.packed_folder import FLOAT_SCALES, PackedFolder, Parts, groups_of
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme, from_unsigned, to_unsigned
from frugallm.formats.words import pack_words, unpack_words

BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")


def unpack_zeros(qzeros: Tensor, bits: int, rows: int, *, less_one: bool) -> Tensor:
    """Return the unsigned zero points ``(groups, out)`` uint8; ``less_one``: they are stored less one."""
    if less_one and 32 % bits == 0:
        ones = sum(1 << place for place in range(0, 32, bits))
        return unpack_words(qzeros + ones, bits, rows)
    zeros = unpack_words(qzeros, bits, rows)
    return (zeros + 1) & (2**bits - 1) if less_one else zeros


def unpack(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, *, less_one: bool
) -> QuantizedTensor | Tensor:
    """Decode one linear.

    Returns
    -------
    QuantizedTensor or Tensor
        ``(out, in)``; values in float32 where groups are not consecutive columns of one width.
    """
    groups, rows = scales.shape
    width = qweight.shape[0] * 32 // bits if g_idx is None else len(g_idx)
    codes = unpack_words(qweight.T.contiguous(), bits, width)
    zeros = unpack_zeros(qzeros, bits, rows, less_one=less_one)
    if width % groups == 0:
        size = width // groups
        if g_idx is None or torch.equal(g_idx, torch.arange(width, dtype=g_idx.dtype) // size):
            return from_unsigned(codes, zeros.T, scales.T, bits)
    if g_idx is None:
        g_idx = torch.arange(width) // -(-width // groups)
    group = g_idx.long()
    return (codes.float() - zeros.T[:, group]) * scales.T[:, group].float()


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of one linear: the first version where the grid is symmetric, else ``gptq_v2``."""
    codes, zeros = to_unsigned(q)
    bits, width = q.scheme.bits, codes.shape[1]
    stored = zeros - 1 if q.zero is None else zeros
    return {
        "qweight": pack_words(codes, bits).T.contiguous(),
        "qzeros": pack_words(stored.T, bits),
        "scales": q.scale.T.contiguous(),
        "g_idx": torch.arange(width, dtype=torch.int32) // (width // q.scale.shape[1]),
    }


def settings(scheme: WeightScheme, linears: list[str] | None) -> dict[str, Any]:
    """Return ``quantization_config`` for linears of one scheme; ``linears`` of each block, ``None``: all of them."""
    named = {} if linears is None else {"modules_in_block_to_quantize": [linears]}
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        **named,
    }


class GPTQFolder(PackedFolder):
    """A folder in the GPTQ layout."""

    method: ClassVar[str] = "gptq"
    leaves: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        version = self.settings.get("checkpoint_format") or self.settings.get("format") or "gptq"
        if version not in VERSIONS:
            raise ModelError(
                f"{self.path}: the GPTQ format '{version}' is not read", f"Known: {', '.join(VERSIONS)}"
            )
        self._less_one = version == "gptq"
        try:
            dynamic = dict(self.settings.get("dynamic") or {})
            self._exceptions = [
                (re.compile(pattern.removeprefix("+:")), dict(changed or {}))
                for pattern, changed in dynamic.items()
                if not pattern.startswith("-:")
            ]
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise ModelError(f"{self.path / 'config.json'}: 'dynamic' cannot be read ({error})") from error

    def summary(self) -> str:  # noqa: D102
        size = self.settings.get("group_size", -1)
        groups = "per row" if size == -1 else f"groups of {size}"
        return f"GPTQ, {self.bits('')} bits, {groups}" + (", with exceptions" if self._exceptions else "")

    def bits(self, path: str) -> int:
        """Return how many bits the codes of a linear have; ``dynamic`` names exceptions by pattern."""
        bits = self._exception(path).get("bits", self.settings.get("bits"))
        if bits not in BITS:
            raise ModelError(
                f"{self.path / 'config.json'}: GPTQ with bits={bits!r} is not read",
                f"Known: {', '.join(map(str, BITS))}",
            )
        return bits

    def packed_shape(self, parts: Parts) -> tuple[int, int]:  # noqa: D102
        bits = self.bits(parts.path)
        words, rows = parts.matrix("qweight", ("I32",))
        groups, _ = parts.matrix("scales", FLOAT_SCALES)
        width = words * 32 // bits
        parts.expect("scales", FLOAT_SCALES, (groups, rows))
        parts.expect("qzeros", ("I32",), (groups, -(-rows * bits // 32)))
        if "g_idx" in parts:
            parts.expect("g_idx", ("I32", "I64"), (width,))
        size = self._exception(parts.path).get("group_size", self.settings.get("group_size", -1))
        expected = groups_of(width, size, self.path)
        if groups != expected:
            raise parts.error(
                f"{parts.path}.scales has {groups} groups, group_size {size} of {width} columns makes {expected}"
            )
        return rows, width

    def decode(self, parts: Parts) -> QuantizedTensor | Tensor:  # noqa: D102
        scales = parts["scales"]
        g_idx = parts.get("g_idx")
        if g_idx is not None and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < len(scales):
            raise parts.error(f"{parts.path}.g_idx names a group outside 0 to {len(scales) - 1}")
        return unpack(
            parts["qweight"],
            parts["qzeros"],
            scales,
            g_idx,
            self.bits(parts.path),
            less_one=self._less_one,
        )

    def _exception(self, path: str) -> dict[str, Any]:
        return next((changed for pattern, changed in self._exceptions if pattern.match(path)), {})
