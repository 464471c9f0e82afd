"""From what a user writes to an engine that is ready, on the fastest runner that knows the model."""

from __future__ import annotations

from typing import Any

from frugallm.engine.core import Engine, Limits
from frugallm.engine.reference import ReferenceRunner, why_not
from frugallm.engine.runner import BLOCK_SIZE, Runner
from frugallm.engine.serial import SerialEngine
from frugallm.errors import ModelError, ParameterError
from frugallm.models.family import Heads

#: Tokens that the cache holds unless a model's context is longer or memory is short.
CACHE_TOKENS = 16384
MEMORY_SHARE = 0.25
UNKNOWN_CONTEXT = 2048


def open_engine(
    model: Any, tokenizer: Any = None, cache_tokens: int | None = None, step: int = 512, sequences: int = 64
) -> tuple[Engine, str]:
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
    tuple of Engine and str
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
        if value is not None and value < least:
            raise ParameterError(f"{name} must be at least {least}; got {value}")
    network, tokenizer = _load(model, tokenizer)
    config = network.config
    context = getattr(config, "max_position_embeddings", None) or UNKNOWN_CONTEXT
    limits = Limits(context, config.get_text_config().vocab_size, step, sequences)
    ends = end_tokens(network, tokenizer)
    if reason := why_not(config):
        note = f"{reason}; it runs through transformers, one answer after another"
        return SerialEngine(network, tokenizer, limits, ends), note
    blocks = cache_blocks(config, context, cache_tokens)
    return Engine(choose_runner(network, blocks), blocks, tokenizer, limits, ends), ""


def choose_runner(network: Any, blocks: int) -> Runner:
    """Return the fastest runner that knows the model, with a cache of ``blocks`` blocks."""
    return ReferenceRunner(network, blocks)


def cache_blocks(config: Any, context: int, tokens: int | None) -> int:
    """Return how many blocks the cache gets for so many tokens, or for what the model and the memory suggest."""
    if tokens is not None:
        return -(-tokens // BLOCK_SIZE)
    import psutil

    heads = Heads.of(config)
    token_bytes = 2 * 4 * config.num_hidden_layers * heads.values * heads.width
    room = int(psutil.virtual_memory().available * MEMORY_SHARE / token_bytes)
    return max(1, min(max(context, CACHE_TOKENS), room) // BLOCK_SIZE)


def end_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens with which a model ends what it writes."""
    named = [tokenizer.eos_token_id, network.config.eos_token_id]
    if network.generation_config is not None:
        named.append(network.generation_config.eos_token_id)
    listed = [each if isinstance(each, list) else [each] for each in named]
    return frozenset(token for tokens in listed for token in tokens if token is not None)


def _load(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import PreTrainedModel

    from frugallm.models import load

    if not isinstance(model, PreTrainedModel):
        return load(model)
    if tokenizer is None:
        raise ModelError(
            "a loaded model comes without its tokenizer", "Give it as well: LLM(model, tokenizer)"
        )
    return model.eval(), tokenizer
