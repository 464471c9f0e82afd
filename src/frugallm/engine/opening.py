"""From what a user writes to an engine that is ready, on the fastest runner that knows the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from frugallm.engine.core import Answering, Engine, Limits
from frugallm.engine.reference import ReferenceRunner, why_not
from frugallm.engine.runner import BLOCK_SIZE, Runner
from frugallm.engine.serial import SerialEngine
from frugallm.errors import ModelError, ParameterError
from frugallm.models.family import Heads

#: Tokens that the cache holds unless a model's context is longer or memory is short.
CACHE_TOKENS = 16384
MEMORY_SHARE = 0.25
UNKNOWN_CONTEXT = 2048


@dataclass(frozen=True)
class Opened:
    """A model, and what it is computed with.

    Attributes
    ----------
    config, tokenizer
        As ``transformers`` has them.
    ends
        Tokens with which the model ends what it writes.
    native
        Packed weights for the native runner, where there is one that knows the model.
    network
        Else the plain model.
    reason
        Why it is not native, where that was not asked for.
    """

    config: Any
    tokenizer: Any
    ends: frozenset[int]
    native: Any = None
    network: Any = None
    reason: str = ""


def open_engine(
    model: Any, tokenizer: Any = None, cache_tokens: int | None = None, step: int = 512, sequences: int = 64
) -> tuple[Answering, str]:
    """Open a model for the engine.

    Parameters
    ----------
    model
        A name, a folder, a GGUF file, or a loaded model.
    tokenizer
        Tokenizer of a loaded model.
    cache_tokens
        Tokens whose keys and values the cache holds; ``None``: as many as the context, at least 16,384, at most what a
        quarter of the free memory holds.
    step, sequences
        Most tokens and sequences of one step.

    Returns
    -------
    tuple of Answering and str
        The engine, and a line about what the user should know, or nothing.

    Raises
    ------
    ModelError
        If the model cannot be found, read or understood.
    ParameterError
        If a size makes no sense.
    """
    for name, value in (("cache_tokens", cache_tokens), ("step_tokens", step), ("sequences", sequences)):
        least = BLOCK_SIZE if name == "cache_tokens" else 1
        open_size = value is None and name == "cache_tokens"
        if not open_size and (not isinstance(value, int) or value < least):
            raise ParameterError(f"{name} must be a whole number of at least {least}; got {value!r}")
    opened = _open(model, tokenizer)
    context = getattr(opened.config, "max_position_embeddings", None) or UNKNOWN_CONTEXT
    limits = Limits(context, opened.config.get_text_config().vocab_size, step, sequences)
    # The reference computes one token at a time. Where native code is there and does not know a model, plain transformers
    # is the faster choice.
    reason = "" if opened.native is not None else opened.reason or why_not(opened.config)
    if reason:
        note = f"{reason}; it runs through transformers, one answer after another"
        return SerialEngine(opened.network, opened.tokenizer, limits, opened.ends), note
    blocks = cache_blocks(opened.config, context, cache_tokens, 2 if opened.native is not None else 4)
    return Engine(choose_runner(opened, blocks), blocks, opened.tokenizer, limits, opened.ends), ""


def choose_runner(opened: Opened, blocks: int) -> Runner:
    """Return the runner with a cache of so many blocks: native where the model was opened for it, else the reference."""
    if opened.native is not None:
        from frugallm.kernels.native_runner import NativeRunner

        return NativeRunner(opened.native, blocks)
    return ReferenceRunner(opened.network, blocks)


def cache_blocks(config: Any, context: int, tokens: int | None, value_bytes: int) -> int:
    """Return how many blocks the cache gets for so many tokens, or for what the model and the memory suggest.

    Raises
    ------
    ParameterError
        If so many tokens do not fit into memory, at ``value_bytes`` for each number.
    """
    import psutil

    heads = Heads.of(config)
    token_bytes = 2 * value_bytes * config.num_hidden_layers * heads.values * heads.width
    free = psutil.virtual_memory().available
    if tokens is None:
        return max(1, min(max(context, CACHE_TOKENS), int(free * MEMORY_SHARE) // token_bytes) // BLOCK_SIZE)
    if tokens * token_bytes > free:
        raise ParameterError(
            f"cache_tokens is {tokens}, which takes {tokens * token_bytes / 1e9:.1f} GB of memory; "
            f"{free / 1e9:.1f} are free",
            f"Take at most {free // token_bytes}",
        )
    return -(-tokens // BLOCK_SIZE)


def end_tokens(*named: Any) -> frozenset[int]:
    """Return the ids among what is named: numbers, lists of numbers, ``None``."""
    listed = [each if isinstance(each, list) else [each] for each in named]
    return frozenset(token for tokens in listed for token in tokens if token is not None)


def _open(model: Any, tokenizer: Any) -> Opened:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and tokenizer is None:
        raise ModelError(
            "a loaded model comes without its tokenizer", "Give it as well: LLM(model, tokenizer)"
        )
    native = _open_native(model, tokenizer)
    if native is not None and native.native is not None:
        return native
    network, tokenizer = _load(model, tokenizer)
    config, generation = network.config, network.generation_config
    ends = end_tokens(tokenizer.eos_token_id, config.eos_token_id, generation and generation.eos_token_id)
    return Opened(config, tokenizer, ends, network=network, reason=native.reason if native else "")


def _open_native(model: Any, tokenizer: Any) -> Opened | None:
    """Open a model for native code, or say why it cannot be; ``None`` where there is no native code."""
    if not native_wanted():
        return None
    from frugallm.kernels.decoder import read_decoder
    from frugallm.models import open_checkpoint

    try:
        checkpoint = open_checkpoint(model, tokenizer, compressed=True)
        decoder = read_decoder(checkpoint)
    except ModelError as error:  # what is wrong with the model itself is found again, and said, by loading it
        return Opened(None, None, frozenset(), reason=error.message)
    generation = checkpoint.generation() or {}
    config = checkpoint.config
    ends = end_tokens(checkpoint.tokenizer.eos_token_id, config.eos_token_id, generation.get("eos_token_id"))
    return Opened(config, checkpoint.tokenizer, ends, native=decoder)


def native_wanted() -> bool:
    """Whether there is native code for this processor, and ``FRUGAL_KERNELS`` does not ask for the reference."""
    from frugallm.kernels.library import path_name

    return path_name() != "reference"


def _load(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import PreTrainedModel

    from frugallm.models import load

    return (model.eval(), tokenizer) if isinstance(model, PreTrainedModel) else load(model)
