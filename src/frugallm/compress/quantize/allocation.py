"""Sharing out a budget: which of several options each of many parts gets, so that the sum of errors is least."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Steps into which a budget is cut at most; costs that do not fit the steps are rounded up.
STEPS = 2**16


def allocate(errors: Tensor, costs: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """Return which option each part gets: the least sum of errors at no more than ``budget``.

    Solved exactly, by going through the parts and keeping, for every cost, the least sum of errors so far. Where the
    budget is cut more coarsely than the costs need, these count as a step more at most, and the budget still holds.

    Parameters
    ----------
    errors
        ``(parts, options)`` float64.
    costs
        Whole numbers, one for each part and option.

    Returns
    -------
    list or None
        The index of each part's option; ``None`` if even the cheapest cost more than the budget.
    """
    least = [min(row) for row in costs]
    if sum(least) > budget:
        return None
    extra = torch.tensor([[cost - low for cost in row] for row, low in zip(costs, least)])
    room = min(budget - sum(least), int(extra.amax(1).sum()))
    unit = _unit(extra, room)
    steps, extra = room // unit, -(-extra // unit)
    best = torch.zeros(steps + 1, dtype=torch.float64)  # by steps spent, at most
    picked: list[Tensor] = []
    for error, cost in zip(errors.double(), extra.tolist()):
        tried = torch.full((len(cost), steps + 1), torch.inf, dtype=torch.float64)
        for option, spent in enumerate(cost):
            if spent <= steps:
                tried[option, spent:] = best[: steps + 1 - spent] + error[option]
        best, pick = tried.min(0)
        picked.append(pick.to(torch.int8))
    left, found = steps, []
    for pick, cost in zip(reversed(picked), reversed(extra.tolist())):
        found.append(int(pick[left]))
        left -= cost[found[-1]]
    return found[::-1]


def _unit(extra: Tensor, room: int) -> int:
    """Return the largest number that divides all costs, or a larger one of which ``room`` has no more than ``STEPS``."""
    return max(math.gcd(*extra.flatten().tolist()), -(-room // STEPS), 1)
