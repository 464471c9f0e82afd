"""Folders in the ``bitnet`` layout and in ours of one bit, read back (:mod:`frugallm.formats.bitnet_layout`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from frugallm.errors import ModelError
from frugallm.formats.bitnet_layout import METHOD, ONE_BIT, SCHEME, normalize, round_tokens, unpack
from frugallm.formats.packed_folder import FLOAT_SCALES, INTACT, PackedFolder, Parts
from frugallm.formats.quantized_tensor import QuantizedTensor

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def quantize_inputs(linear: nn.Module, gains: Tensor | None, eps: float) -> None:
    """Normalize, where there are gains, and round the inputs of ``linear`` from now on."""

    def prepare(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = inputs[0] if gains is None else normalize(inputs[0], gains, eps)
        return (round_tokens(x),)

    linear.register_forward_pre_hook(prepare)


class BitNetFolder(PackedFolder):
    """A folder in the ``bitnet`` layout of ``transformers``."""

    method: ClassVar[str] = METHOD
    leaves: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "rms_norm.weight")
    exports: ClassVar[bool] = False  # a norm inside every linear has no place elsewhere
    bits: ClassVar[Literal[1, 2]] = 2

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        super().__init__(folder, name)
        self.linear_class = self.settings.get("linear_class", "bitlinear")
        if self.linear_class == "autobitlinear" and self.settings.get("quantization_mode") == "online":
            raise ModelError(
                f"{self.path} holds weights for training (quantization_mode: online)",
                "Give a folder whose weights are packed",
            )

    @classmethod
    def only_read_here(cls, folder: Path) -> bool:
        """Plain ``transformers`` loads the folder, but compiles code before it computes the same."""
        return True

    def packed_shape(self, parts: Parts) -> tuple[int, int]:  # noqa: D102
        rows, width = parts.matrix("weight", ("U8",))
        parts.expect("weight_scale", FLOAT_SCALES, (1,))
        if ("rms_norm.weight" in parts) != bool(self.settings.get("use_rms_norm")):
            raise parts.error(f"use_rms_norm in config.json does not fit {parts.path}.rms_norm.weight")
        if "rms_norm.weight" in parts:
            parts.expect("rms_norm.weight", FLOAT_SCALES, (width,))
        return rows * 8 // self.bits, width

    def decode(self, parts: Parts) -> QuantizedTensor:  # noqa: D102
        codes = unpack(parts["weight"], self.bits)
        if codes.amax() > 1:
            raise parts.error(f"{parts.path}.weight holds codes that mean nothing")
        scale = parts["weight_scale"].float()
        if not (scale.isfinite().all() and scale.gt(0).all()):
            raise ModelError(f"{self.path}: {parts.path}.weight_scale is {scale.item()}", INTACT)
        scale = scale if self.linear_class == "autobitlinear" else 1 / scale
        return QuantizedTensor(codes, scale.expand(len(codes), 1).contiguous(), None, SCHEME)

    def summary(self) -> str:  # noqa: D102
        inside = ", a norm inside" if self.settings.get("use_rms_norm") else ""
        return f"BitNet, {'ternary' if self.bits == 2 else 'binary'} weights, A8 per token{inside}"

    def prepare(self, model: PreTrainedModel) -> None:
        """Normalize and round inputs, and multiply biases by the scale where the format does."""
        eps = float(self.settings.get("rms_norm_eps", 1e-6))
        for path in self.packed:
            linear = model.get_submodule(path)
            quantize_inputs(linear, self.part(path, "rms_norm.weight"), eps)
            bias, scale = linear.bias, self.part(path, "weight_scale")
            if self.linear_class == "autobitlinear" and isinstance(bias, Tensor) and scale is not None:
                bias.data.mul_(scale.float())


class OneBitFolder(BitNetFolder):
    """A folder of binary weights in our own layout of one bit."""

    method: ClassVar[str] = ONE_BIT
    bits: ClassVar[Literal[1, 2]] = 1
