"""A model that is loaded already, as a checkpoint."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from frugallm.errors import ModelError
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.family import family_of
from frugallm.models.gguf_tokenizer import tokenizer_files
from frugallm.models.linears import from_plain, linear_shapes


class InMemory(Checkpoint):
    """Weights of a ``transformers`` model in memory; the model itself is only read.

    Parameters
    ----------
    model
        A causal language model of a supported family, not quantized.
    tokenizer
        Its tokenizer, if there is one.
    """

    config_source = "its configuration"

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.name = model.config.name_or_path or type(model).__name__
        self.config = model.config
        self.family = family_of(model.config)
        if getattr(model.config, "quantization_config", None) is not None:
            raise ModelError(f"{self.name} is already compressed", "Start from the original model")
        self._tokenizer = tokenizer
        self._generation = model.generation_config
        self._state = model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        if model.config.tie_word_embeddings:
            shapes.pop(f"{self.family.head}.weight", None)
        self._shapes = linear_shapes(self.family, shapes)

    def names(self) -> list[str]:  # noqa: D102
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        if name not in self._shapes:
            raise ModelError(f"{self.name}: there is no tensor '{name}'")
        return self._shapes[name]

    def digest(self) -> str:  # noqa: D102
        return self._digest

    @cached_property
    def _digest(self) -> str:
        total = hashlib.sha256()
        for name in self.names():
            tensor = from_plain(self.family, name, self._state).detach().cpu().contiguous()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.view(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    def companions(self) -> dict[str, bytes]:  # noqa: D102
        files = {} if self._tokenizer is None else tokenizer_files(self._tokenizer)
        if self._generation is not None:
            files["generation_config.json"] = self._generation.to_json_string().encode()
        return files

    def _read(self, name: str, start: int | None, stop: int | None) -> Tensor:
        tensor = from_plain(self.family, name, self._state).detach()[start:stop]
        return tensor.to("cpu", copy=True).contiguous()

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise ModelError(f"{self.name} came without a tokenizer", "Pass tokenizer=... beside the model")
        return self._tokenizer
