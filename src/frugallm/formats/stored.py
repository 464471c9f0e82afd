"""A compressed model as a checkpoint: every tensor has the value that its stored form stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from frugallm.compress.plan import Plan
from frugallm.formats import compressed_tensors, rounded_inputs
from frugallm.formats.quantized_tensor import LinearScheme
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.linears import turned
from frugallm.models.open import dense_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stored(Checkpoint):
    """What a job has written, read back by its plan.

    Parameters
    ----------
    base
        The model before compression; names, shapes, configuration and companions are its own.
    plan
        How each linear and table is stored.
    shard
        Returns the file of a part: ``embedding``, ``block-00000`` …, ``final``.
    """

    def __init__(self, base: Checkpoint, plan: Plan, shard: Callable[[str], Path]) -> None:
        self.base, self.plan, self.shard = base, plan, shard
        self.name, self.config, self.family = f"{base.name} as stored", base.config, base.family

    def names(self) -> list[str]:  # noqa: D102
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self.base.shape(name)

    def digest(self) -> str:  # noqa: D102
        raise NotImplementedError("the digest of a result is that of its files")

    def companions(self) -> dict[str, bytes]:  # noqa: D102
        return self.base.companions()

    def _load_tokenizer(self) -> Any:
        return self.base.tokenizer

    def part(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        if name.startswith(f"{self.family.blocks}."):
            index = int(name.removeprefix(f"{self.family.blocks}.").split(".")[0])
            return self.shard(f"block-{index:05d}")
        return self.shard("embedding" if name == f"{self.family.embedding}.weight" else "final")

    def where(self, name: str) -> str:  # noqa: D102
        return str(self.part(name))

    def input_parameters(self, path: str) -> dict[str, Tensor]:
        """Return the stored tensors of a linear's rounded inputs, by leaf."""
        with safe_open(self.part(f"{path}.weight"), "pt") as file:
            names = set(file.keys())
            leaves = [leaf for leaf in rounded_inputs.LEAVES if f"{path}.{leaf}" in names]
            return {leaf: file.get_tensor(f"{path}.{leaf}") for leaf in leaves}

    def _read(self, name: str, start: int | None, stop: int | None) -> Tensor:
        path = name.removesuffix(".weight")
        linear, table = self.plan.linears.get(path), self.plan.tables.get(path)
        with safe_open(self.part(name), "pt") as file:
            if not name.endswith(".weight") or (linear is None and table is None):
                tensor = file.get_tensor(name)
                tensor = tensor.T if turned(self.family, name, tensor.shape) else tensor
                return tensor[start:stop].float()
            tensors = {k: file.get_tensor(k) for k in file.keys() if k.startswith(f"{path}.")}  # noqa: SIM118
        if table is not None:
            q = compressed_tensors.decode_linear(
                path, tensors, LinearScheme(weights=table.scheme), table=True
            )
        else:
            assert linear is not None
            q = compressed_tensors.decode_linear(path, tensors, linear.scheme)
        if start is None or stop is None or q.extras:  # an extra may mix rows
            return q.dequantize()[start:stop]
        return q.rows(start, stop).dequantize()


def model_in_memory(stored: Stored) -> PreTrainedModel:
    """Return the plain model, float32, with the stored values, its inputs rounded as the schemes say."""
    model = dense_model(stored, torch.float32)
    for path, plan in stored.plan.linears.items():
        scheme = plan.scheme.activations
        if scheme is not None:
            rounded_inputs.round_inputs(model.get_submodule(path), scheme, stored.input_parameters(path))
    return model
