"""How fast a model reads a prompt (prefill) and writes an answer (decode), in plain ``transformers``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict

from frugallm.errors import ParameterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rate(BaseModel):
    """A rate measured several times: median, slowest and fastest, in ``unit``."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float
    repeats: int
    unit: str = "tokens/s"

    @classmethod
    def of(cls, values: Sequence[float], unit: str = "tokens/s") -> Rate:
        """Sum up what several runs gave."""
        return cls(
            value=statistics.median(values), low=min(values), high=max(values), repeats=len(values), unit=unit
        )


class Speed(BaseModel):
    """Prefill and decode rates of one model, and how they were measured."""

    model_config = ConfigDict(frozen=True)

    prefill: Rate
    decode: Rate
    prompt_tokens: int
    new_tokens: int
    threads: int
    dtype: str


def measure_speed(
    model: PreTrainedModel, prompt_tokens: int = 256, new_tokens: int = 32, repeats: int = 3, seed: int = 0
) -> Speed:
    """Time a model as it is loaded: in the type of its weights, one sequence, greedy.

    Parameters
    ----------
    model
        A causal language model.
    prompt_tokens
        Length of the prompt of random tokens.
    new_tokens
        Tokens decoded one by one behind it.
    repeats
        How many times; one more, which is not counted, goes before.
    seed
        Of the prompt.
    """
    if min(prompt_tokens, new_tokens, repeats) < 1:
        raise ParameterError("prompt_tokens, new_tokens and repeats must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)
    times = [_once(model, prompt, new_tokens) for _ in range(repeats + 1)][1:]
    return Speed(
        prefill=Rate.of([prompt_tokens / prefill for prefill, _ in times]),
        decode=Rate.of([new_tokens / decode for _, decode in times]),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
    )


@torch.inference_mode()
def _once(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of one prefill and of decoding behind it."""
    start = time.perf_counter()
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    between = time.perf_counter()
    for _ in range(new_tokens):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return between - start, time.perf_counter() - between
