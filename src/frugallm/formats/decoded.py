"""A folder that ``frugal run`` wrote, as a checkpoint: every weight has the value that its stored codes stand for.

The folder's ``config.json`` says how each linear and table is stored; nothing else is needed to read it. Tensors are
decoded one at a time, so a model larger than memory can be read as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from frugallm.errors import ModelError
from frugallm.formats import compressed_tensors, extras, rounded_inputs
from frugallm.formats.packed_folder import PackedFolder, Parts
from frugallm.formats.quantized_tensor import ActivationScheme, LinearScheme, QuantizedTensor, WeightScheme
from frugallm.models.safetensors_folder import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tensors that stand in the place of a weight, by the end of their names.
PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale"),
    *compressed_tensors.SECOND_LEAVES,
    *extras.LEAVES,
    *rounded_inputs.LEAVES,
)


def scheme_of(group: Mapping[str, Any]) -> LinearScheme:
    """Return the scheme that one entry of ``config_groups`` describes."""
    weights, inputs = group["weights"], group["input_activations"]
    activations = inputs and ActivationScheme(
        bits=inputs["num_bits"],
        grid=inputs.get("grid", "int") if inputs["type"] == "int" else "e4m3",
        dynamic=inputs["dynamic"],
        outliers=inputs.get("outliers"),
        clusters=inputs.get("clusters"),
        reassembled=inputs.get("reassembled", False),
        rotation=inputs.get("rotation"),
    )
    return LinearScheme(weights=_weights_of(weights), activations=activations)


def _weights_of(arguments: Mapping[str, Any]) -> WeightScheme:
    second, bits = arguments.get("second"), arguments["num_bits"]
    floats = {4: "e2m1", 8: "e4m3"}
    scales = {"torch.uint8": "float8_e8m0fnu", "torch.float8_e4m3fn": "float8_e4m3fn"}
    return WeightScheme(
        bits=bits,
        grid=arguments.get("grid", "int") if arguments["type"] == "int" else floats[bits],
        scale_dtype=scales.get(arguments.get("scale_dtype", ""), "bfloat16"),
        symmetric=arguments["symmetric"],
        group_size=arguments["group_size"],
        zero_dtype=arguments.get("zero_dtype", "int8"),
        extras=tuple(arguments.get("extras", ())),
        second=second and _weights_of(second),
    )


def _matches(target: str, path: str) -> bool:
    return bool(re.match(target.removeprefix("re:"), path)) if target.startswith("re:") else target == path


class Decoded(PackedFolder):
    """A folder that ``frugal run`` wrote, read back."""

    method: ClassVar[str] = "compressed-tensors"
    leaves: ClassVar[tuple[str, ...]] = PARTS
    names_tied_head: ClassVar[bool] = True

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        super().__init__(folder, name)
        self.dtype = str(self.config.dtype).removeprefix("torch.")
        self._groups = [(g["targets"], scheme_of(g)) for g in self.settings["config_groups"].values()]

    def read_settings(self) -> dict[str, Any]:
        """Return ``quantization_config``; a result that is pruned and no more has none."""
        if self.quantization is None and (self.path / "manifest.json").is_file():
            return {"quant_method": self.method, "config_groups": {}}
        return super().read_settings()

    @classmethod
    def only_read_here(cls, folder: Path) -> bool:
        """Whether plain ``transformers`` does not load it (``engines.yaml``).

        Those are zero points, an embedding in packed codes, and whatever has a key of our own.
        """
        groups = read_config(folder)["quantization_config"].get("config_groups", {}).values()
        packed_table = any(
            g["format"] == "pack-quantized" and all(t.startswith("re:") for t in g["targets"]) for g in groups
        )
        own = any(
            {"outliers", "clusters", "grid"} & {*(g["input_activations"] or ())}
            or {"extras", "grid"} & {*g["weights"]}
            for g in groups
        )
        return packed_table or own or any(not g["weights"]["symmetric"] for g in groups)

    def summary(self) -> str:  # noqa: D102
        schemes = [scheme for path in self.packed if (scheme := self.scheme(path)) is not None]
        counts = Counter(scheme.label() for scheme in schemes)
        forms = (f"{form} ({n} of them)" if len(counts) > 1 else form for form, n in sorted(counts.items()))
        return f"compressed-tensors, {', '.join(forms)}"

    def scheme(self, path: str) -> LinearScheme | None:
        """Return how the linear or table of that name is stored; ``None``: as it is."""
        if path not in self._parts:
            return None
        for targets, scheme in self._groups:
            if any(_matches(target, path) for target in targets):
                return scheme
        by_class = [scheme for targets, scheme in self._groups if "Linear" in targets]
        if not by_class:
            raise ModelError(f"{self.where(f'{path}.weight')}: config.json describes no scheme of {path}")
        return by_class[0]

    def input_parameters(self, path: str) -> dict[str, Tensor]:
        """Return the stored tensors of a linear's rounded inputs, by leaf."""
        found = {leaf: self.part(path, leaf) for leaf in rounded_inputs.LEAVES}
        return {leaf: tensor for leaf, tensor in found.items() if tensor is not None}

    @property
    def quantizes(self) -> bool:
        """Whether anything is stored in another form than dense."""
        return bool(self._groups)

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of any linear are rounded at run time."""
        return any(scheme.activations is not None for _, scheme in self._groups)

    def prepare(self, model: PreTrainedModel) -> None:
        """Round inputs of linears as the schemes say."""
        for path in self.packed:
            scheme = self.scheme(path)
            if scheme is not None and scheme.activations is not None:
                linear = model.get_submodule(path)
                rounded_inputs.round_inputs(linear, scheme.activations, self.input_parameters(path))

    def packed_shape(self, parts: Parts) -> tuple[int, int]:  # noqa: D102
        if "weight_shape" not in parts:
            halves = "weight_packed" in parts  # two codes of FP4 in a byte
            rows, width = parts.shape("weight_packed" if halves else "weight")
            return rows, 2 * width if halves else width
        rows, width = parts["weight_shape"].tolist()
        return rows, width

    def decode(self, parts: Parts) -> QuantizedTensor:  # noqa: D102
        scheme = self.scheme(parts.path)
        assert scheme is not None
        tensors = {f"{parts.path}.{part}": parts[part] for part in PARTS if part in parts}
        table = parts.path in (self.family.embedding, self.family.head)
        return compressed_tensors.decode_linear(parts.path, tensors, scheme, table=table)


class Own(Decoded):
    """A result in our own container: the same tensors, in files that no other program takes for its own."""

    method: ClassVar[str] = compressed_tensors.OWN

    @classmethod
    def only_read_here(cls, folder: Path) -> bool:
        """Plain ``transformers`` finds no file that it knows."""
        return True
