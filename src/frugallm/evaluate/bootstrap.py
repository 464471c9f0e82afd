"""Intervals: a paired bootstrap over windows, and the verdict drawn from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

RESAMPLES = 10_000
LEVEL = 0.95
BROKEN_RATIO = 10.0

Verdict = Literal["better", "same within noise", "worse", "broken"]


class Measure(BaseModel):
    """A number, its unit, and its 95 % interval; ``low`` and ``high`` are ``None`` where it is unknown."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""


def interval(
    values: Sequence[float] | Tensor, seed: int = 0, of: Callable[[Tensor], Tensor] = lambda mean: mean
) -> tuple[float, float] | None:
    """Return the bootstrap interval of a function of the mean over windows.

    Windows are drawn with replacement, 10,000 times; the interval leaves out 2.5 % on each side. Figures of
    two models on the same windows are paired by passing the differences of their windows.

    Parameters
    ----------
    values
        One value per window.
    seed
        Decides the draws.
    of
        What is wanted of the mean, e.g. ``torch.exp`` for a perplexity.

    Returns
    -------
    tuple of float, or None
        Low and high end; ``None`` with one window, and where a value is not finite.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    if len(x) < 2 or not x.isfinite().all():
        return None
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [
            x[torch.randint(len(x), (1000, len(x)), generator=generator)].mean(1)
            for _ in range(RESAMPLES // 1000)
        ]
    )
    tail = (1 - LEVEL) / 2
    ends = torch.quantile(of(means.flatten()), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def measure(
    values: Sequence[float] | Tensor,
    unit: str,
    seed: int = 0,
    of: Callable[[Tensor], Tensor] = lambda mean: mean,
) -> Measure:
    """Return a function of the mean over windows, with its interval."""
    x = torch.as_tensor(values, dtype=torch.float64)
    low, high = interval(x, seed, of) or (None, None)
    return Measure(value=float(of(x.mean())), low=low, high=high, unit=unit)


def verdict(
    perplexity: float, vocabulary: int, reference: float | None, ratio: Measure | None
) -> Verdict | None:
    """Judge a model from its perplexity.

    - ``"broken"``: the perplexity is not finite, or worse than that of the uniform distribution over the
      vocabulary, or more than ten times the reference's;
    - otherwise from the 95 % interval of the paired perplexity ratio: entirely above 1 is ``"worse"``,
      entirely below 1 is ``"better"``, one that contains 1 is ``"same within noise"``;
    - ``None`` where there is no reference, or no interval because there is only one window.

    Parameters
    ----------
    perplexity
        Of the model.
    vocabulary
        Number of tokens the model chooses from.
    reference
        Perplexity of the reference on the same windows, if there is one.
    ratio
        Perplexity over the reference's, with its interval.
    """
    if not math.isfinite(perplexity) or perplexity > vocabulary:
        return "broken"
    if reference is not None and perplexity > BROKEN_RATIO * reference:
        return "broken"
    if ratio is None or ratio.low is None or ratio.high is None:
        return None
    if ratio.low > 1:
        return "worse"
    return "better" if ratio.high < 1 else "same within noise"
