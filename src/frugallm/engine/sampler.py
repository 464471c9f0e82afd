"""The choice of a token from its logits: pure functions of logits, parameters and the tokens before.

Random numbers are computed from a counter (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): the
key is seed and choice, the counter the position. So no state has to survive preemption, and batching cannot shift it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from frugallm.engine.sampling import SamplingParams

Logits = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float64]
#: Tokens among which the likeliest are looked for first.
SOME = (256, 4096)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one place: of the token taken, and of the likeliest ones, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def uniform(seed: int, choice: int, position: int) -> float:
    """Return the random number in [0, 1) that belongs to one token."""
    # The lowest word of the counter is left to the generator, which counts with it.
    bits = np.random.Philox(key=[seed, choice], counter=[0, position, 0, 0])
    return float(np.random.Generator(bits).random())


def choose(
    logits: Logits,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    seed: int,
    choice: int = 0,
    allowed: npt.NDArray[np.bool_] | None = None,
) -> int:
    """Choose the next token.

    Parameters
    ----------
    logits
        float32 ``(vocabulary,)``, of the model as it is.
    prompt, output
        Token ids so far.
    seed, choice
        Key of the random number; its counter is the position of the token, ``len(prompt) + len(output)``.
    allowed
        bool ``(vocabulary,)``: tokens that a grammar permits; ``None``: all.
    """
    changed = penalized(biased(logits, params), params, prompt, output)
    if allowed is not None:
        changed = np.where(allowed, changed, -np.inf)
    if params.temperature == 0:
        return int(changed.argmax())
    weights = filtered(changed, params)
    total = weights.cumsum()
    place = uniform(seed, choice, len(prompt) + len(output)) * total[-1]
    # The first token whose cumulated weight lies above; rounding may reach the total itself.
    return int(min(np.searchsorted(total, place, side="right"), np.flatnonzero(weights)[-1]))


def biased(logits: Logits, params: SamplingParams) -> Logits:
    """Return logits with ``logit_bias`` added."""
    if not params.logit_bias:
        return logits
    changed = logits.copy()
    for token, bias in params.logit_bias.items():
        changed[token] += bias
    return changed


def penalized(logits: Logits, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Logits:
    """Return logits with repetition (prompt and output), presence and frequency (output) penalties.

    The first is that of Keskar et al., "CTRL", 2019; the others are those of the OpenAI interface.
    """
    if not params.penalized:
        return logits
    changed = logits.copy()
    seen = np.unique(np.fromiter((*prompt, *output), np.int64))
    old = changed[seen]
    changed[seen] = np.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    for token, times in Counter(output).items():
        changed[token] -= params.presence_penalty + params.frequency_penalty * times
    return changed


def filtered(logits: Logits, params: SamplingParams) -> Weights:
    """Return weights ``(vocabulary,)`` to draw with, not normalised: after temperature, top-k, top-p and min-p.

    References
    ----------
    top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020; min-p: Nguyen et al., 2024.
    """
    # The largest logit becomes 0 first, so that a tiny temperature overflows nothing.
    scaled = (logits.astype(np.float64) - float(logits.max())) / params.temperature
    weights = np.exp(scaled)
    if 0 < params.top_k < len(weights):
        least = np.partition(weights, -params.top_k)[-params.top_k]
        weights[weights < least] = 0.0
    if params.top_p < 1:
        weights = _nucleus(weights, params.top_p)
    if params.min_p > 0:
        weights[weights < params.min_p] = 0.0  # the largest weight is 1
    return weights


def _nucleus(weights: Weights, share: float) -> Weights:
    """Keep the likeliest tokens that together reach a share; of equals those with the lowest ids."""
    wanted = share * weights.sum()
    for count in (*SOME, len(weights)):  # sorting all tokens takes longer than the few that are kept
        count = min(count, len(weights))
        likely = np.flatnonzero(weights >= np.partition(weights, -count)[-count])
        order = likely[np.argsort(-weights[likely], kind="stable")]
        total = weights[order].cumsum()
        if total[-1] >= wanted:
            break
    kept = order[: int(np.searchsorted(total, wanted)) + 1]
    result = np.zeros_like(weights)
    result[kept] = weights[kept]
    return result


def logprobs(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """Return log-probabilities of ``token`` and of the ``count`` likeliest tokens by the unchanged logits."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    best = np.argsort(-exact, kind="stable")[:count]
    return TokenLogprobs(token, float(exact[token]), tuple((int(i), float(exact[i])) for i in best))
