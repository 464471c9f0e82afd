"""What claims about answering measure with: arms timed in turn, predictions of a runner, inputs of a model's attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from frugallm.engine.runner import Runner

#: Tokens of one step while predictions are computed.
STEP = 256


def in_turn(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return what arms give in several rounds, one arm after the other in each, after a first that does not count.

    What drifts on the machine meets all arms alike.
    """
    for arm in arms.values():
        arm()
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            found[name].append(arm())
    return found


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@torch.inference_mode()
def plain_pace(model: PreTrainedModel, prompt: Tensor, tokens: int) -> float:
    """Return the tokens a second of one answer behind its first, by ``transformers`` and its own cache.

    A loop that does nothing but take the likeliest token, which spares what ``generate`` does beside.

    Parameters
    ----------
    prompt
        Token ids ``(length,)``.
    """
    new, cache, times = prompt[None], None, []
    for _ in range(tokens + 1):
        out = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, new = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter())
    return tokens / (times[-1] - times[0])


class RunnerPredictions:
    """What a runner predicts at every position of a window, as :func:`~frugallm.evaluate.predictions.compare_window` takes it.

    Parameters
    ----------
    runner
        Its cache must hold a window; what it holds is overwritten.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def states(self, window: Tensor) -> Tensor:
        """Return float32 logits ``(positions, vocabulary)`` of a window ``(positions,)``."""
        positions = torch.arange(len(window), dtype=torch.int32)
        table = torch.arange(-(-len(window) // self._runner.block_size), dtype=torch.int32)[None]
        found = []
        for some in positions.split(STEP):
            rows = torch.arange(len(some), dtype=torch.int32)
            ends = torch.tensor([0, len(some)], dtype=torch.int32)
            found.append(self._runner.step(window[some.long()].int(), some, ends, table, rows))
        return torch.cat(found)

    def logits(self, states: Tensor) -> Tensor:
        """Return some rows of :meth:`states` as they are."""
        return states


class _Recorded(Exception):
    """Ends a forward pass once what was looked for has been seen."""


@torch.inference_mode()
def attention_inputs(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return what the attention of a model's middle layer is given for a text, behind norms and rotation.

    Parameters
    ----------
    tokens
        Token ids ``(length,)``.

    Returns
    -------
    tuple
        Queries ``(heads, length, width)``, keys and values ``(heads of keys, length, width)``, and the scores' scale.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    middle, seen = model.config.num_hidden_layers // 2, []

    def record(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any
    ) -> tuple[Tensor, None]:
        if module.layer_idx == middle:
            seen.append((query[0], key[0], value[0], float(more["scaling"])))
            raise _Recorded
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    before = model.config._attn_implementation
    AttentionInterface.register("frugal_record", record)
    model.set_attn_implementation("frugal_record")
    try:
        model.get_decoder()(input_ids=tokens[None], use_cache=False)
    except _Recorded:
        pass
    finally:
        model.set_attn_implementation(before)
    return seen[0]
