"""The AWQ layout, as AutoAWQ and GPTQModel write it: 4 bits, groups of input columns, integer zero points.

Tensors of a linear ``(out, in)``; words are int32 and hold 8 codes each, see :mod:`frugallm.formats.words`:

======= ======================== ======================== =============================================
version ``qweight``              ``qzeros``               ``scales`` float16
======= ======================== ======================== =============================================
gemm    ``(in, out / 8)`` words  ``(groups, out / 8)``    ``(groups, out)``
                                 words
gemv    ``(out, in / 8)`` words  ``(out, groups / 8)``    ``(out, groups)``; both padded to whole words
                                 words                    and a width that the kernel asks for
======= ======================== ======================== =============================================

The value is ``scale * (code - zero)``. In ``gemm`` field ``i`` of word ``w`` holds column ``8 w + ORDER[i]``, for codes
and zero points alike; ``gemv`` keeps the natural order.

References
----------
https://github.com/casper-hansen/AutoAWQ, ``awq/modules/linear/gemm.py``, ``gemv.py`` and ``awq/utils/packing_utils.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from frugallm.errors import ModelError
from frugallm.formats.packed_folder import FLOAT_SCALES, PackedFolder, Parts, groups_of
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme, from_unsigned, to_unsigned
from frugallm.formats.words import pack_words, unpack_words

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
VERSIONS = ("gemm", "gemv")


def interleaved(columns: Tensor, order: tuple[int, ...]) -> Tensor:
    """Take the columns of ``(rows, 8 n)`` in ``order`` within each eight."""
    return columns.view(len(columns), -1, 8)[..., list(order)].reshape(len(columns), -1)


def natural(fields: Tensor) -> Tensor:
    """Put the fields of unpacked words back into the order of columns."""
    return interleaved(fields, tuple(sorted(range(8), key=ORDER.__getitem__)))


def unpack_gemm(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedTensor:
    """Decode one linear of the version ``gemm``: ``(out, in)``."""
    rows = scales.shape[1]
    codes = natural(unpack_words(qweight, BITS, rows)).T.contiguous()
    zeros = natural(unpack_words(qzeros, BITS, rows)).T
    return from_unsigned(codes, zeros, scales.T, BITS)


def unpack_gemv(qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: int) -> QuantizedTensor:
    """Decode one linear of the version ``gemv``: ``(out, in)``."""
    codes = unpack_words(qweight, BITS, 8 * qweight.shape[1])
    return from_unsigned(codes, unpack_words(qzeros, BITS, groups), scales[:, :groups], BITS)


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of one linear in the version ``gemm``; a symmetric grid has zero points of 8."""
    codes, zeros = to_unsigned(q)
    return {
        "qweight": pack_words(interleaved(codes.T.contiguous(), ORDER), BITS),
        "qzeros": pack_words(interleaved(zeros.T.contiguous(), ORDER), BITS),
        "scales": q.scale.T.contiguous(),
    }


def settings(scheme: WeightScheme, skipped: list[str]) -> dict[str, Any]:
    """Return ``quantization_config`` for linears of one scheme, with the names of what is left as it is."""
    return {
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": skipped,
    }


class AWQFolder(PackedFolder):
    """A folder in the AWQ layout."""

    method: ClassVar[str] = "awq"
    leaves: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        version = self.settings.get("version") or self.settings.get("format") or "gemm"
        self._version = version.lower() if isinstance(version, str) else version
        if self._version not in VERSIONS:
            raise ModelError(
                f"{self.path}: the AWQ version '{version}' is not read", f"Known: {', '.join(VERSIONS)}"
            )
        if self.settings.get("bits") != BITS:
            raise ModelError(
                f"{self.path / 'config.json'}: AWQ with bits={self.settings.get('bits')!r} is not read",
                "Known: 4",
            )

    def summary(self) -> str:  # noqa: D102
        size = self.settings.get("group_size")
        return f"AWQ ({self._version}), 4 bits, {'per row' if size == -1 else f'groups of {size}'}"

    def packed_shape(self, parts: Parts) -> tuple[int, int]:  # noqa: D102
        down, across = parts.matrix("qweight", ("I32",))
        rows, width = (8 * across, down) if self._version == "gemm" else (down, 8 * across)
        groups = groups_of(width, self.settings.get("group_size"), self.path)
        if width % groups:
            raise parts.error(f"{parts.path} has {width} columns, which {groups} groups cannot share")
        if self._version == "gemm":
            parts.expect("scales", FLOAT_SCALES, (groups, rows))
            parts.expect("qzeros", ("I32",), (groups, across))
            return rows, width
        _, padded = parts.matrix("qzeros", ("I32",))
        parts.expect("qzeros", ("I32",), (rows, max(padded, -(-groups // 8))))
        parts.expect("scales", FLOAT_SCALES, (rows, 8 * padded))
        return rows, width

    def decode(self, parts: Parts) -> QuantizedTensor:  # noqa: D102
        tensors = parts["qweight"], parts["qzeros"], parts["scales"]
        if self._version == "gemm":
            return unpack_gemm(*tensors)
        width = self.packed_shape(parts)[1]
        return unpack_gemv(*tensors, groups_of(width, self.settings.get("group_size"), self.path))
