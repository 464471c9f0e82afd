"""Statistics of a linear's input, gathered by name while the calibration windows pass.

A method names what it needs; the walk gathers each statistic once per site for all methods that asked, in float32.
Adding a statistic is adding one class to :data:`STATISTICS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from frugallm.evaluate.precision import products_in

Statistics = dict[str, Tensor]

_COLUMNS = 256  # of a second moment per product


class Accumulator(Protocol):
    """Takes inputs ``(tokens, in)`` in any number of pieces and returns one tensor."""

    def __init__(self, width: int) -> None: ...

    def add(self, x: Tensor) -> None:
        """Take in one piece ``(tokens, in)``."""

    def value(self) -> Tensor:
        """Return the statistic of all pieces."""


class AbsMax:
    """``max |x_j|`` of every channel, ``(in,)``."""

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width)

    def add(self, x: Tensor) -> None:
        """Take in one piece ``(tokens, in)``."""
        self.total = torch.maximum(self.total, x.abs().amax(0).float())

    def value(self) -> Tensor:
        """Return the channel maxima ``(in,)``."""
        return self.total


class MeanSquare:
    """``mean x_j^2`` of every channel, ``(in,)``: the diagonal of the second moment without the rest of it."""

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in one piece ``(tokens, in)``."""
        self.total += x.float().square().sum(0)
        self.tokens += x.shape[0]

    def value(self) -> Tensor:
        """Return the mean squares ``(in,)``."""
        return self.total / max(self.tokens, 1)


class SecondMoment:
    """``X^T X / tokens``, ``(in, in)`` float32.

    The inputs are bfloat16 where the processor multiplies that faster; products of two bfloat16 numbers are exact in
    float32, so the sum loses nothing against float32 inputs of the same values.
    """

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, width)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in one piece ``(tokens, in)``."""
        with products_in(x.dtype):
            x = x.float()
            for start in range(0, x.shape[1], _COLUMNS):  # the upper triangle is enough
                stop = start + _COLUMNS
                self.total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self.tokens += x.shape[0]

    def value(self) -> Tensor:
        """Return the second moment ``(in, in)``, symmetric to the last bit; called once."""
        self.total.triu_()
        self.total += self.total.triu(1).T
        return self.total.div_(max(self.tokens, 1))  # the one large tensor, not a copy of it


STATISTICS: dict[str, type[Accumulator]] = {
    "absmax": AbsMax,
    "mean_square": MeanSquare,
    "second_moment": SecondMoment,
}


class Gather:
    """The accumulators of one site for the statistics named in ``needs``."""

    def __init__(self, needs: Iterable[str], width: int) -> None:
        self.accumulators = {name: STATISTICS[name](width) for name in sorted(needs)}

    def add(self, x: Tensor) -> None:
        """Take in inputs ``(..., in)``."""
        x = x.reshape(-1, x.shape[-1])
        for accumulator in self.accumulators.values():
            accumulator.add(x)

    def values(self) -> Statistics:
        """Return name to statistic."""
        return {name: a.value() for name, a in self.accumulators.items()}
