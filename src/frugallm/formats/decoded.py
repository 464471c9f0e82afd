"""A folder that ``frugal run`` wrote, as a checkpoint: every weight has the value that its stored codes stand for.

The folder's ``config.json`` says how each linear and table is stored; nothing else is needed to read it. Tensors are
decoded one at a time, so a model larger than memory can be read as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from frugallm.errors import ModelError
from frugallm.formats import compressed_tensors
from frugallm.formats.quantized_tensor import (
    ActivationScheme,
    LinearScheme,
    QuantizedTensor,
    WeightScheme,
)
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.safetensors_folder import (
    SafetensorsFolder,
    load_tokenizer,
    open_safetensors,
    parse_config,
    read_config,
    weight_files,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Tensors that stand in the place of a weight, by the end of their names.
PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale")


def scheme_of(group: Mapping[str, Any]) -> LinearScheme:
    """Return the scheme that one entry of ``config_groups`` describes."""
    weights, inputs = group["weights"], group["input_activations"]
    activations = inputs and ActivationScheme(bits=inputs["num_bits"], dynamic=inputs["dynamic"])
    return LinearScheme(
        weights=WeightScheme(
            bits=weights["num_bits"], symmetric=weights["symmetric"], group_size=weights["group_size"]
        ),
        activations=activations,
    )


def only_read_here(folder: Path) -> bool:
    """Whether ``folder`` is a result of ``frugal run`` that plain ``transformers`` does not load.

    Those are zero points, and an embedding in packed codes (``engines.yaml``).
    """
    if not (folder / "manifest.json").is_file():
        return False
    groups = (read_config(folder).get("quantization_config") or {}).get("config_groups", {}).values()
    packed_table = any(
        g["format"] == "pack-quantized" and all(t.startswith("re:") for t in g["targets"]) for g in groups
    )
    return packed_table or any(not g["weights"]["symmetric"] for g in groups)


def load_decoded(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return a plain model with the values that the stored codes stand for, its inputs rounded as the schemes say."""
    from frugallm.formats.stored import round_inputs
    from frugallm.models.open import dense_model

    decoded = Decoded(folder)
    decoded.validate()
    model = dense_model(decoded, dtype)
    for path in {name.rpartition(".")[0] for name in decoded.names()}:
        scheme = decoded.scheme(path)
        if scheme is not None and scheme.activations is not None:
            round_inputs(model.get_submodule(path), scheme.activations, decoded.input_scale(path))
    return model


def _matches(target: str, path: str) -> bool:
    return bool(re.match(target.removeprefix("re:"), path)) if target.startswith("re:") else target == path


class Decoded(Checkpoint):
    """A compressed folder, read back.

    Parameters
    ----------
    folder
        What ``frugal run`` wrote.

    Raises
    ------
    ModelError
        If it is no model folder, or none that is compressed in the compressed-tensors format.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.name = folder, str(folder)
        self._base = SafetensorsFolder(folder)
        raw = read_config(folder)
        quantization = raw.pop("quantization_config", {})
        if quantization.get("quant_method") != "compressed-tensors":
            raise ModelError(f"{folder} is not compressed in the compressed-tensors format")
        self.config = parse_config(raw, folder / "config.json")
        self.dtype = str(raw["dtype"])
        self.family = self._base.family
        self._groups = [(g["targets"], scheme_of(g)) for g in quantization["config_groups"].values()]
        self._files = {file: open_safetensors(folder / file) for file in weight_files(folder)}
        self._holder = {name: file for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118

    def scheme(self, path: str) -> LinearScheme | None:
        """Return how the linear or table of that name is stored; ``None``: as it is."""
        if f"{path}.weight_scale" not in self._holder:
            return None
        for targets, scheme in self._groups:
            if any(_matches(target, path) for target in targets):
                return scheme
        by_class = [scheme for targets, scheme in self._groups if "Linear" in targets]
        if not by_class:
            raise ModelError(
                f"{self.where(f'{path}.weight_scale')}: config.json describes no scheme of {path}"
            )
        return by_class[0]

    def input_scale(self, path: str) -> Tensor | None:
        """Return the static input scale ``(1,)`` of a linear, if it has one."""
        name = f"{path}.input_scale"
        return self._stored(name) if name in self._holder else None

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of any linear are rounded at run time."""
        return any(scheme.activations is not None for _, scheme in self._groups)

    def names(self) -> list[str]:  # noqa: D102
        found = set()
        for name in self._holder:
            path, _, leaf = name.rpartition(".")
            found.add(f"{path}.weight" if leaf in PARTS else name)
        if self.config.tie_word_embeddings:
            found.discard(f"{self.family.head}.weight")
        return sorted(found)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        path = name.removesuffix(".weight")
        if f"{path}.weight_shape" in self._holder:
            return tuple(self._stored(f"{path}.weight_shape").tolist())
        if name not in self._holder:
            raise ModelError(f"{self.name}: there is no tensor '{name}'")
        return tuple(self._files[self._holder[name]].get_slice(name).get_shape())

    def where(self, name: str) -> str:  # noqa: D102
        packed = name.removesuffix(".weight") + ".weight_packed"
        return str(self.path / self._holder.get(name, self._holder.get(packed, "")))

    def digest(self) -> str:  # noqa: D102
        return self._base.digest()

    def companions(self) -> dict[str, bytes]:  # noqa: D102
        return self._base.companions()

    @property
    def metadata(self) -> dict[str, str]:
        """What the folder's model card says."""
        return self._base.metadata

    def _load_tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    def _stored(self, name: str) -> Tensor:
        try:
            return self._files[self._holder[name]].get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self.where(name)}: {name} cannot be read ({error})") from error

    def quantized(self, name: str) -> QuantizedTensor | None:
        """Return the stored form of a weight; ``None``: it is stored as it is."""
        path = name.removesuffix(".weight")
        scheme = self.scheme(path) if name != path else None
        if scheme is None:
            return None
        tensors = {n: self._stored(n) for part in PARTS if (n := f"{path}.{part}") in self._holder}
        table = path in (self.family.embedding, self.family.head)
        return compressed_tensors.decode_linear(path, tensors, scheme, table=table)

    def _read(self, name: str, start: int | None, stop: int | None) -> Tensor:
        q = self.quantized(name)
        return self._stored(name)[start:stop].clone() if q is None else q.dequantize()[start:stop]
