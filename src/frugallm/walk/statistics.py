"""Statistics of a linear's input, gathered by name while the calibration windows pass.

A method names what it needs; the walk gathers each statistic once per site for all methods that asked, in float32.
Adding a statistic is adding one class to :data:`STATISTICS`. One that compares both streams of hidden states stands in
:data:`PAIRED`; whoever needs one makes the walk carry the second.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from frugallm.compress.quantize.hadamard import Rotation
from frugallm.evaluate.precision import products_in

Statistics = dict[str, Tensor]

_COLUMNS = 256  # of a second moment per product
#: How many tokens a sample holds at most.
SAMPLE_TOKENS = 256


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


class AbsMean:
    """``mean |x_j|`` of every channel, ``(in,)``."""

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in one piece ``(tokens, in)``."""
        self.total += x.abs().sum(0, dtype=torch.float32)
        self.tokens += x.shape[0]

    def value(self) -> Tensor:
        """Return the mean magnitude of every channel ``(in,)``."""
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
        """Return the second moment ``(in, in)``, symmetric to the last bit; called once.

        Where no token ever came (an expert that was never chosen) it is the identity: nothing is known, so every input
        counts alike.
        """
        if not self.tokens:
            return self.total.fill_diagonal_(1.0)
        self.total.triu_()
        self.total += self.total.triu(1).T
        return self.total.div_(max(self.tokens, 1))  # the one large tensor, not a copy of it


class MeanSquare:
    """Mean over the tokens of ``x_j^2`` of every channel, ``(in,)`` float32: the diagonal of the second moment."""

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, dtype=torch.float64)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in one piece ``(tokens, in)``."""
        self.total += x.float().square().sum(0)
        self.tokens += x.shape[0]

    def value(self) -> Tensor:
        """Return the mean squares ``(in,)``."""
        return (self.total / max(self.tokens, 1)).float()


class Extremes:
    """Smallest and largest value of every channel, ``(2, in)``; zeros where no token ever came."""

    def __init__(self, width: int) -> None:
        self.low, self.high = torch.full((width,), torch.inf), torch.full((width,), -torch.inf)

    def add(self, x: Tensor) -> None:
        """Take in one piece ``(tokens, in)``."""
        if len(x):
            self.low = torch.minimum(self.low, x.amin(0).float())
            self.high = torch.maximum(self.high, x.amax(0).float())

    def value(self) -> Tensor:
        """Return the smallest values in the first row, the largest in the second, ``(2, in)``."""
        both = torch.stack([self.low, self.high])
        return torch.where(both.isfinite(), both, torch.zeros_like(both))


class Sample:
    """Some of the inputs themselves: every *n*-th token, at most :data:`SAMPLE_TOKENS` of them, ``(tokens, in)``.

    Which tokens are kept depends on their order alone, not on the pieces in which they come: whenever there are twice
    too many, every second one is let go, and from there on only every second one is taken.
    """

    def __init__(self, width: int) -> None:
        self.kept = torch.empty(0, width)
        self.every, self.seen = 1, 0

    def add(self, x: Tensor) -> None:
        """Take in one piece ``(tokens, in)``."""
        first = -self.seen % self.every
        self.kept = torch.cat([self.kept.to(x.dtype), x[first :: self.every]])
        self.seen += len(x)
        while len(self.kept) >= 2 * SAMPLE_TOKENS:
            self.kept, self.every = self.kept[::2].clone(), 2 * self.every

    def value(self) -> Tensor:
        """Return the tokens kept, ``(tokens, in)`` float32: all, or as many as the limit, evenly spread."""
        count = min(len(self.kept), SAMPLE_TOKENS)
        spread = torch.arange(count) * len(self.kept) // max(count, 1)
        return self.kept[spread].float()


class CrossMoment:
    """``(X_o - X)^T X / tokens``, ``(in, in)`` float32: how far the inputs have moved, against the inputs.

    ``X (tokens, in)`` are the inputs of the model as stored, ``X_o`` those of the original model for the same tokens, both
    in the basis of the block as it is rounded (behind what rewrites it). Divided by the tokens as the second moment is, so
    that the two may stand in one formula.
    """

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, width)
        self.tokens = 0

    def add(self, x: Tensor, original: Tensor) -> None:
        """Take in one piece of both streams, ``(tokens, in)`` each."""
        with products_in(x.dtype):
            moved = original.float() - x.float()
            self.total.addmm_(moved.T, x.float())
        self.tokens += x.shape[0]

    def value(self) -> Tensor:
        """Return the moment ``(in, in)``; called once. Row ``i`` is the channel that moved."""
        return self.total.div_(max(self.tokens, 1))


STATISTICS: dict[str, type[Accumulator]] = {
    "absmax": AbsMax,
    "absmean": AbsMean,
    "extremes": Extremes,
    "mean_square": MeanSquare,
    "sample": Sample,
    "second_moment": SecondMoment,
}

#: Statistics of both streams at once: the inputs of the model as stored, and those of the original model.
PAIRED: dict[str, type[CrossMoment]] = {"cross_moment": CrossMoment}


class Gather:
    """The accumulators of one site for the statistics named in ``needs``, of inputs in the basis ``rotation``."""

    def __init__(self, needs: Iterable[str], width: int, rotation: Rotation | None = None) -> None:
        needs = sorted(needs)
        self.rotation = rotation
        self.accumulators = {name: STATISTICS[name](width) for name in needs if name not in PAIRED}
        self.pairs = {name: PAIRED[name](width) for name in needs if name in PAIRED}

    def __bool__(self) -> bool:
        return bool(self.accumulators or self.pairs)

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Take in inputs ``(..., in)``, and the original model's for the same tokens where a statistic compares them."""
        if not self:
            return
        x = self._turned(x)
        for accumulator in self.accumulators.values():
            accumulator.add(x)
        for pair in self.pairs.values():
            assert original is not None
            pair.add(x, self._turned(original))

    def _turned(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, x.shape[-1])
        return x if self.rotation is None else self.rotation.apply(x.float()).to(x.dtype)

    def values(self) -> Statistics:
        """Return name to statistic."""
        alone = {name: accumulator.value() for name, accumulator in self.accumulators.items()}
        return {**alone, **{name: pair.value() for name, pair in self.pairs.items()}}
