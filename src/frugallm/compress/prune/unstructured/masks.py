"""Masks: which entries of a weight become zero, given a score for each. Tensors in, tensors out.

Counts are exact whatever the scores: of equal scores the first in order are taken, so a weight with many equal or zero
entries is not pruned further than asked for.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Pattern = Literal["unstructured", "2:4", "4:8"]


class Sparsity(BaseModel):
    """How many of a weight's entries are zero, and where they may lie.

    Attributes
    ----------
    share
        Share of the entries ``(out, in)`` that are zero.
    pattern
        ``"unstructured"``: anywhere. ``"n:m"``: ``n`` of every ``m`` consecutive inputs of a row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(ge=0, lt=1)
    pattern: Pattern = "unstructured"

    @property
    def group(self) -> int | None:
        """The ``m`` of ``n:m``; ``None`` where zeros may lie anywhere."""
        return None if self.pattern == "unstructured" else int(self.pattern.partition(":")[2])

    def count(self, entries: int) -> int:
        """Return how many of so many entries are zero."""
        return round(self.share * entries)

    def label(self) -> str:
        """Return a short name such as ``50 % zeros, 2:4``."""
        return f"{100 * self.share:g} % zeros" + (f", {self.pattern}" if self.group else "")


def pattern_share(pattern: Pattern) -> float | None:
    """Return the share of zeros that a pattern fixes; ``None`` where it fixes none."""
    zeros, _, group = pattern.partition(":")
    return int(zeros) / int(group) if group else None


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark exactly ``count`` entries with the lowest scores in every slice along the last dimension.

    Parameters
    ----------
    scores
        ``(..., entries)``, finite.

    Returns
    -------
    Tensor
        bool, of the same shape.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # numpy's selection holds one copy of the scores; torch's holds an index of 8 bytes for each as well.
    highest = torch.from_numpy(np.partition(scores.numpy(), count - 1, axis=-1)[..., count - 1 : count])
    below, equal = scores < highest, scores == highest
    left = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left))


def choose_zeros(scores: Tensor, sparsity: Sparsity, within: Literal["row", "layer"]) -> Tensor:
    """Mark the entries of a weight that become zero: those with the lowest scores.

    Parameters
    ----------
    scores
        ``(out, in)``.
    within
        What unstructured zeros are compared within: each row gets its share, or the whole weight has it. With ``n:m``
        the comparison is within each group.

    Returns
    -------
    Tensor
        bool ``(out, in)``.
    """
    if sparsity.group:
        groups = scores.reshape(scores.shape[0], -1, sparsity.group)
        return lowest(groups, sparsity.count(sparsity.group)).view(scores.shape)
    compared = scores if within == "row" else scores.reshape(1, -1)
    return lowest(compared, sparsity.count(compared.shape[-1])).view(scores.shape)
