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
Ids = npt.NDArray[np.int64]
#: Weights that are summed together before the sums are cumulated, which one after the other takes ten times as long.
BLOCK = 256
#: The reciprocal of a temperature is no larger, so that it times 0 is 0.
SHARPEST = 1e30


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
    ids, weights = filtered(changed, params)
    place = drawn(weights, uniform(seed, choice, len(prompt) + len(output)))
    return place if ids is None else int(ids[place])


def drawn(weights: Weights, number: float) -> int:
    """Return the place of the first weight at which the weights up to there exceed a share of all.

    Parameters
    ----------
    weights
        ``(tokens,)``, not normalised.
    number
        The share, in [0, 1).
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK))
    block, rest = _above(sums, number * float(sums.sum()))
    return block * BLOCK + _above(weights[block * BLOCK : (block + 1) * BLOCK], rest)[0]


def _above(weights: Weights, wanted: float) -> tuple[int, float]:
    """Return the first place where cumulated weights lie above what is wanted, and what is wanted of it."""
    total = weights.cumsum()
    # Rounding may reach the total itself; what weighs nothing is never taken.
    place = int(min(np.searchsorted(total, wanted, side="right"), np.flatnonzero(weights)[-1]))
    return place, wanted - float(total[place - 1] if place else 0.0)


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


def filtered(logits: Logits, params: SamplingParams) -> tuple[Ids | None, Weights]:
    """Return what to draw from after temperature, top-k, top-p and min-p.

    Returns
    -------
    tuple
        Token ids, ascending (``None``: all), and their weights, not normalised; the largest is 1.

    References
    ----------
    top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020; min-p: Nguyen et al., 2024.
    """
    ids = None
    largest = logits.max()
    if 0 < params.top_k < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -params.top_k)[-params.top_k])
        logits = logits[ids]
    sharpness = min(1 / params.temperature, SHARPEST)
    weights = np.exp((logits - largest) * np.float32(sharpness)).astype(np.float64)
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= params.min_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def _nucleus(weights: Weights, share: float) -> Ids:
    """Return the places of the largest weights that together reach a share; of equals the first ones."""
    total = weights.sum()
    # What is left out here weighs less than what may be left out, all of it together. To sort the rest is quick.
    some = np.flatnonzero(weights >= (1 - share) * total / len(weights))
    weights = weights[some]
    likely = -np.sort(-weights)
    many = min(int(np.searchsorted(likely.cumsum(), share * total)), len(some) - 1) + 1
    kept = weights > likely[many - 1]
    kept[np.flatnonzero(weights == likely[many - 1])[: many - int(kept.sum())]] = True
    return some[kept]


def logprobs(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """Return log-probabilities of ``token`` and of the ``count`` likeliest tokens by the unchanged logits."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    count = min(count, len(logits))
    best = np.flatnonzero(logits >= np.partition(logits, -count)[-count]) if count else np.arange(0)
    best = best[np.argsort(-logits[best], kind="stable")[:count]]
    return TokenLogprobs(token, float(exact[token]), tuple((int(i), float(exact[i])) for i in best))
