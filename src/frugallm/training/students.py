"""The models that are trained: made from one that is there, or anew from a configuration."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from frugallm.errors import ModelError, ParameterError, nearest
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.family import Family, family_of
from frugallm.models.in_memory import InMemory

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


#: Configurations for training from scratch: 0.9 and 6 million weights, with a tokenizer made from the text.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
CONTEXT = 1024
END = "<|end|>"


@dataclass(frozen=True)
class Origin:
    """What a training begins with.

    Attributes
    ----------
    checkpoint
        The model given; ``None`` where a configuration of ours is trained from scratch.
    config, tokenizer, family
        Of the model to be trained.
    scratch
        Whether weights are made anew.
    name
        What the user wrote.
    """

    name: str
    config: PretrainedConfig
    tokenizer: Any
    family: Family
    checkpoint: Checkpoint | None
    scratch: bool

    def identity(self) -> dict[str, Any]:
        """Return what decides the weights at the beginning, as plain JSON values."""
        if not self.scratch and self.checkpoint is not None:
            return {"name": self.name, "digest": self.checkpoint.digest()}
        config = json.dumps(self.config.to_diff_dict(), sort_keys=True, default=str)
        known = {} if self.tokenizer is None else self.tokenizer.get_vocab()
        vocabulary = json.dumps(sorted(known.items()))
        digests = [hashlib.sha256(text.encode()).hexdigest() for text in (config, vocabulary)]
        return {"name": self.name, "from_scratch": True, "config": digests[0], "tokenizer": digests[1]}

    def student(self, seed: int) -> PreTrainedModel:
        """Return the model to be trained, float32: that of the checkpoint, or new weights of that seed."""
        if self.scratch:
            return new_model(self.config, seed)
        model = self.teacher()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model

    def teacher(self) -> PreTrainedModel:
        """Return the model given, float32, for use without gradients."""
        from frugallm.models.open import dense_model

        assert self.checkpoint is not None
        return dense_model(self.checkpoint)


def new_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Return a model with new weights, float32.

    Raises
    ------
    ModelError
        If the configuration describes no model that can be built.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        except (RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ModelError(
                f"no model can be built from this configuration ({error})", "Mend --shape"
            ) from error


def new_config(name: str, changes: dict[str, Any]) -> PretrainedConfig:
    """Return one of the configurations of :data:`SHAPES`, with changes."""
    from transformers import LlamaConfig

    shape = {
        **SHAPES[name],
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return changed(LlamaConfig(**shape), changes)


def changed(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """Return a copy of a configuration with some values changed.

    Raises
    ------
    ParameterError
        If it has no such value, or the change is of another kind.
    """
    known = config.to_dict()
    for key, value in changes.items():
        if key not in known:
            raise ParameterError(f"the configuration has no '{key}'", nearest(key, known))
        if type(known[key]) in (int, float, bool) and type(value) is not type(known[key]):
            raise ParameterError(
                f"the configuration's {key} is {known[key]!r}; got {value!r}", "Mend --shape"
            )
    known.update(changes)
    if {"hidden_size", "num_attention_heads"} & changes.keys() and "head_dim" not in changes:
        known["head_dim"] = None
    try:
        return type(config).from_dict({k: v for k, v in known.items() if k != "head_dim" or v is not None})
    except Exception as error:  # its own validation raises errors of several kinds
        raise ModelError(f"no model can have this configuration ({error})", "Mend --shape") from error


def train_tokenizer(documents: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of ``size`` tokens made from ``documents``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def open_origin(
    model: Any, tokenizer: Any, text: str | None, *, scratch: bool, changes: dict[str, Any]
) -> Origin:
    """Return what a training begins with.

    Parameters
    ----------
    model
        What :func:`~frugallm.models.open.open_checkpoint` takes; from scratch also a name in :data:`SHAPES`.
    text
        The text to train on, which a new tokenizer is made from.
    changes
        Values of the configuration to change; only from scratch.

    Raises
    ------
    ModelError, ParameterError
        If there is no such model, or no model can have this configuration.
    """
    from frugallm.models.open import open_checkpoint
    from frugallm.text import open_text

    if isinstance(model, str) and model in SHAPES:
        if not scratch:
            raise ModelError(f"'{model}' is a shape without weights", "Add --from-scratch")
        config = new_config(model, changes)
        made = train_tokenizer(open_text(text, "calibrate").documents, int(config.vocab_size))
        return Origin(model, config, made, family_of(config), None, True)
    if changes and not scratch:
        raise ParameterError("a trained model keeps its shape", "Add --from-scratch, or leave out --shape")
    checkpoint = open_checkpoint(model, tokenizer)
    config = changed(checkpoint.config, changes) if scratch else checkpoint.config
    return Origin(checkpoint.name, config, checkpoint.tokenizer, family_of(config), checkpoint, scratch)


class Trained(InMemory):
    """A trained model as a checkpoint, with what belongs to the one it began with."""

    def __init__(self, student: PreTrainedModel, origin: Origin) -> None:
        super().__init__(student, origin.tokenizer)
        self.name, self._origin = f"{origin.name} trained", origin.checkpoint

    def companions(self) -> dict[str, bytes]:
        """Tokenizer, chat template, license: those of the model it began with; else what is made here."""
        return super().companions() if self._origin is None else self._origin.companions()

    @property
    def metadata(self) -> dict[str, str]:
        """Facts for a model card as the model given has them."""
        return {} if self._origin is None else self._origin.metadata
