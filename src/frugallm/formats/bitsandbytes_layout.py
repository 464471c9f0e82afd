"""The layouts of bitsandbytes, as ``transformers`` saves them.

In 8 bits (``load_in_8bit``), tensors of a linear ``(out, in)``; the value is ``weight SCB / 127``:

============= ================================================
weight        ``(out, in)`` int8
SCB           ``(out,)`` float32: what code 127 stands for
weight_format uint8 scalar 0: codes lie row by row
============= ================================================

Inputs are rounded at run time, outlier channels excepted (LLM.int8(); ``llm_int8_threshold``), and so are they here.

In 4 bits (``load_in_4bit``); the value of an entry is ``quant_map[code] absmax[block]``, rounded to ``dtype``:

================================== ===========================================================================
weight                             two codes a byte, the first in the high half; ``(out in / 2, 1)`` uint8, or
                                   the same bytes under another type (``bnb_4bit_quant_storage``)
weight.quant_map                   the 16 values of NF4 or FP4
weight.absmax                      one for each block of ``blocksize`` entries, counted through the rows; floats,
                                   or, if nested, uint8 codes of ``nested_quant_map``, with ``nested_absmax`` for each
                                   ``nested_blocksize`` of them and ``nested_offset`` added
weight.quant_state.bitsandbytes__… JSON as uint8: quant_type, blocksize, dtype, shape, nested_*
================================== ===========================================================================

References
----------
https://github.com/bitsandbytes-foundation/bitsandbytes, ``functional.py`` (``QuantState``) and ``backends/default/ops.py``.
Dettmers et al.: LLM.int8(), 2022, https://arxiv.org/abs/2208.07339; QLoRA, 2023, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from torch import Tensor

from frugallm.errors import ModelError
from frugallm.formats.packed_folder import FLOAT_SCALES, PackedFolder, Parts
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
STORAGE_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class QuantState(BaseModel):
    """What the JSON beside a 4-bit weight says; the nested facts where block maxima are codes themselves."""

    model_config = ConfigDict(frozen=True)

    blocksize: PositiveInt
    dtype: str = Field(pattern="^(float32|float16|bfloat16)$")
    shape: tuple[PositiveInt, PositiveInt]
    nested_blocksize: PositiveInt | None = None
    nested_dtype: str = Field("float32", pattern="^(float32|float16|bfloat16)$")
    nested_offset: float = 0.0


def blockwise(codes: Tensor, quant_map: Tensor, absmax: Tensor, size: int) -> Tensor:
    """Return ``quant_map[codes] * absmax`` of each block of ``size`` codes ``(n,)``, in float32."""
    scale = absmax.float().repeat_interleave(size)[: len(codes)]
    return quant_map.float()[codes.int()] * scale


def unpack_4bit(
    weight: Tensor,
    quant_map: Tensor,
    absmax: Tensor,
    state: QuantState,
    nested: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Decode one linear of 4 bits, ``(out, in)`` in the type that ``state`` names; ``nested``: absmax and map of absmax."""
    packed = weight.contiguous().view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: math.prod(state.shape)]
    absmax = absmax.flatten()
    if nested is not None:
        assert state.nested_blocksize is not None
        outer, outer_map = nested
        inner = blockwise(absmax, outer_map, outer.flatten(), state.nested_blocksize)
        absmax = inner.to(DTYPES[state.nested_dtype]) + state.nested_offset
    return blockwise(codes, quant_map, absmax, state.blocksize).view(state.shape).to(DTYPES[state.dtype])


def unpack_8bit(weight: Tensor, scb: Tensor) -> Tensor:
    """Decode one linear of 8 bits, ``(out, in)`` in float32."""
    return weight.float() * scb.float()[:, None] * (1 / 127)


class BitsAndBytesFolder(PackedFolder):
    """A folder that ``transformers`` saved from a model in 8 or 4 bits of bitsandbytes."""

    method: ClassVar[str] = "bitsandbytes"
    leaves: ClassVar[tuple[str, ...]] = (
        *("SCB", "weight_format", "weight.absmax", "weight.quant_map"),
        *NESTED,
        *STATES,
        "weight",
    )

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._eight = self.settings.get("load_in_8bit") is True
        if self._eight == (self.settings.get("load_in_4bit") is True):
            raise ModelError(
                f"{self.path / 'config.json'}: bitsandbytes must say either load_in_8bit or load_in_4bit"
            )
        self._threshold = self.settings.get("llm_int8_threshold", 6.0)
        if not isinstance(self._threshold, (int, float)) or not self._threshold >= 0:
            raise ModelError(f"{self.path / 'config.json'}: llm_int8_threshold is {self._threshold!r}")

    def summary(self) -> str:  # noqa: D102
        if self._eight:
            return f"bitsandbytes, 8 bits, inputs rounded beside outliers from {self._threshold:g}"
        kind = self.settings.get("bnb_4bit_quant_type", "fp4")
        nested = ", nested" if self.settings.get("bnb_4bit_use_double_quant") else ""
        return f"bitsandbytes, 4 bits ({kind}{nested})"

    def prepare(self, model: PreTrainedModel) -> None:
        """Round inputs of linears in 8 bits as LLM.int8() does; a threshold of 0 leaves no channel out."""
        from frugallm.formats.rounded_inputs import round_inputs

        scheme = ActivationScheme(bits=8, outliers=self._threshold or math.inf)
        for path in self.packed if self._eight else []:
            round_inputs(model.get_submodule(path), scheme, {})

    def packed_shape(self, parts: Parts) -> tuple[int, int]:  # noqa: D102
        if self._eight:
            rows, width = parts.matrix("weight", ("I8",))
            parts.expect("SCB", FLOAT_SCALES, (rows,))
            if "weight_format" in parts and int(parts["weight_format"]) != 0:
                raise parts.error(
                    f"{parts.path}.weight_format is {int(parts['weight_format'])}, only 0 is read"
                )
            return rows, width
        state = self._state(parts)
        entries = math.prod(state.shape)
        parts.expect("weight", tuple(STORAGE_BYTES))
        stored = math.prod(parts.shape("weight")) * STORAGE_BYTES[parts.dtype("weight")]
        if stored != -(-entries // 2):
            raise parts.error(
                f"{parts.path}.weight has {stored} bytes, {state.shape} in 4 bits take {-(-entries // 2)}"
            )
        nested = any(leaf in parts for leaf in NESTED)
        blocks = -(-entries // state.blocksize)
        self._expect_count(parts, "weight.absmax", ("U8",) if nested else FLOAT_SCALES, blocks)
        self._expect_count(parts, "weight.quant_map", FLOAT_SCALES, 16)
        if nested:
            if state.nested_blocksize is None:
                raise parts.error(f"the quant_state of {parts.path} names no nested_blocksize")
            self._expect_count(parts, NESTED[0], FLOAT_SCALES, -(-blocks // state.nested_blocksize))
            self._expect_count(parts, NESTED[1], FLOAT_SCALES, 256)
        return state.shape

    def decode(self, parts: Parts) -> QuantizedTensor | Tensor:  # noqa: D102
        if self._eight:
            return unpack_8bit(parts["weight"], parts["SCB"])
        nested = (parts[NESTED[0]], parts[NESTED[1]]) if NESTED[0] in parts else None
        return unpack_4bit(
            parts["weight"], parts["weight.quant_map"], parts["weight.absmax"], self._state(parts), nested
        )

    def _state(self, parts: Parts) -> QuantState:
        leaf = next((leaf for leaf in STATES if leaf in parts), STATES[0])
        parts.expect(leaf, ("U8",))
        try:
            return QuantState(**json.loads(bytes(parts[leaf].flatten().tolist())))
        except (ValueError, TypeError, ValidationError) as error:
            line = str(error).splitlines()[-2:]
            raise parts.error(f"{parts.path}.{leaf} cannot be read ({' '.join(line)})") from error

    def _expect_count(self, parts: Parts, leaf: str, types: tuple[str, ...], count: int) -> None:
        parts.expect(leaf, types)
        found = math.prod(parts.shape(leaf))
        if found != count:
            raise parts.error(f"{parts.path}.{leaf} has {found} entries, expected {count}")
