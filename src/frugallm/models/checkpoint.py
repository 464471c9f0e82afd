"""The weights of one model, read tensor by tensor and never all at once.

Every source of weights (a safetensors folder, a GGUF file, a model in memory, a rewrite of another one) is a
:class:`Checkpoint`: it names its tensors as the state dict of the plain ``transformers`` model does. Checks
that every source needs live here, so that no source can forget them.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from frugallm.errors import ModelError
from frugallm.models.family import Family, Heads
from frugallm.models.linears import linear_shapes

SHOWN = 3  # how many offending tensors an error names


class Checkpoint(ABC):
    """Weights of one model under their ``transformers`` names, every linear apart, with what belongs to them.

    Attributes
    ----------
    name
        What the user wrote: ``"smollm2-135m"``, a folder, a file.
    config
        The ``transformers`` configuration; ``tie_word_embeddings`` is true where the head is the embedding.
    family
        Where the parts of the model are.
    config_source
        What to call the origin of ``config`` in messages.
    """

    name: str
    config: PretrainedConfig
    family: Family
    config_source: str = "config.json"

    @abstractmethod
    def names(self) -> list[str]:
        """Return the state-dict names of all tensors, without the head where it is tied to the embedding."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""

    @abstractmethod
    def digest(self) -> str:
        """Return the SHA-256 of the weights in hex, independent of paths and file times."""

    @abstractmethod
    def companions(self) -> dict[str, bytes]:
        """Return what travels with the weights (tokenizer, chat template, license, ...): name to content."""

    def generation(self) -> dict[str, Any] | None:
        """Return the content of ``generation_config.json``, if there is one."""
        stored = self.companions().get("generation_config.json")
        if stored is None:
            return None
        try:
            content = json.loads(stored)
        except ValueError as error:
            raise ModelError(f"{self.name}: generation_config.json cannot be read ({error})") from error
        if not isinstance(content, dict):
            raise ModelError(f"{self.name}: generation_config.json holds no JSON object")
        return content

    @abstractmethod
    def _load_tokenizer(self) -> Any:
        """Build the tokenizer."""

    @abstractmethod
    def _read(self, name: str, start: int | None, stop: int | None) -> Tensor:
        """Read a tensor that is known to exist, or its rows ``start:stop``, into memory of its own."""

    @cached_property
    def tokenizer(self) -> Any:
        """The model's ``PreTrainedTokenizerFast``, built on first use."""
        return self._load_tokenizer()

    @property
    def metadata(self) -> dict[str, str]:
        """Facts for a model card as far as the source knows them: ``license``, ``name``."""
        return {}

    def where(self, name: str) -> str:
        """Return the file that holds a tensor, for messages."""
        return self.name

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into memory of its own, in its stored float type or in float32.

        Raises
        ------
        ModelError
            If there is no such tensor, or it holds NaN or infinite values.
        """
        self.shape(name)
        return self._finite(name, self._read(name, None, None))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start:stop`` of a tensor ``(rows, ...)``."""
        count = self.shape(name)[0]
        if not 0 <= start <= stop <= count:
            raise ModelError(f"{self.where(name)}: rows {start}:{stop} of {name}, which has {count} rows")
        return self._finite(name, self._read(name, start, stop))

    def linears(self) -> list[str]:
        """Return the full names of all linears of all blocks in the order in which they are computed."""
        return [
            f"{self.family.block(index)}.{linear}"
            for index in range(self.config.num_hidden_layers)
            for linear in self.family.linears(self.config, index)
        ]

    def block_state(self, index: int) -> dict[str, Tensor]:
        """Read all tensors of decoder block ``index``; names are relative to the block."""
        prefix = self.family.block(index) + "."
        return {n.removeprefix(prefix): self.tensor(n) for n in self.names() if n.startswith(prefix)}

    def validate(self) -> None:
        """Compare names and shapes of all tensors with the model that the configuration describes.

        Raises
        ------
        ModelError
            One line that names the first few tensors that do not fit.
        """
        blocks = self.block_count()
        if blocks != self.config.num_hidden_layers:
            raise self._misfit(
                f"holds {blocks} blocks, {self.config_source} says {self.config.num_hidden_layers}",
                self.names(),
            )
        heads = Heads.of(self.config)
        if heads.values < 1 or heads.query % heads.values:
            raise self._misfit(
                f"{self.config_source} shares {heads.values} key heads between {heads.query} heads", []
            )
        expected = self.expected_shapes()
        names = set(self.names())
        missing = sorted(expected.keys() - names)
        if missing:
            raise self._misfit(f"{_listing(missing)} missing, {self.config_source} asks for it", missing)
        unexpected = sorted(names - expected.keys())
        if unexpected:
            raise self._misfit(f"{_listing(unexpected)} unknown to {self.config_source}", unexpected)
        for name in sorted(names):
            if self.shape(name) != expected[name]:
                raise self._misfit(
                    f"{name} has shape {self.shape(name)}, {self.config_source} says {expected[name]}", [name]
                )

    def block_count(self) -> int:
        """Count the decoder blocks that the weights have, whatever the configuration says."""
        pattern = re.compile(re.escape(self.family.blocks) + r"\.(\d+)\.")
        return len({match[1] for match in map(pattern.match, self.names()) if match})

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that the configuration asks for."""
        state = meta_model(self).state_dict()
        if self.config.tie_word_embeddings:
            state.pop(f"{self.family.head}.weight", None)
        return linear_shapes(self.family, {name: tuple(tensor.shape) for name, tensor in state.items()})

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.numel():
            low, high = torch.aminmax(tensor)  # one pass without a mask; both are NaN if anything is
            if low.isnan():
                raise ModelError(f"{self.where(name)}: {name} holds NaN", "Get an intact copy of the model")
            if low.isinf() or high.isinf():
                raise ModelError(
                    f"{self.where(name)}: {name} holds infinite values", "Get an intact copy of the model"
                )
        return tensor

    def _misfit(self, what: str, names: Iterable[str]) -> ModelError:
        files = {self.where(name) for name in names} or {self.name}
        where = files.pop() if len(files) == 1 else self.name
        return ModelError(
            f"{where}: {what}", "The weights and their configuration must come from the same model"
        )


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Any:
    """Build the ``transformers`` model that a checkpoint's configuration describes, without its weights.

    Parameters are on the meta device; buffers (rotary frequencies, scales of embeddings) have their values.
    """
    import copy

    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(checkpoint.config)
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    except (
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ) as error:
        raise ModelError(
            f"{checkpoint.name}: {checkpoint.config_source} describes no model that can be built ({error})"
        ) from error


def _listing(names: list[str]) -> str:
    more = len(names) - SHOWN
    return (
        ", ".join(names[:SHOWN])
        + (f" and {more} more" if more > 0 else "")
        + (" are" if len(names) > 1 else " is")
    )
