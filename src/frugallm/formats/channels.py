"""Channels taken apart and put together: another basis for inputs and weights of the same width.

A channel that is too large is split into equal parts, each read by a copy of its weight column; that changes nothing. To
keep the width, channels that resemble each other share one: its value is their mean, its column the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reassembly:
    """Where each of ``in`` channels goes.

    Attributes
    ----------
    groups
        ``(in,)`` int32: number of the channel that each one goes into, from 0 without gaps. Several that go into one are
        replaced by their mean.
    parts
        ``(in,)`` int16: into how many equal parts each one is split. One that shares its channel is not split.
    """

    groups: Tensor
    parts: Tensor

    @classmethod
    def none(cls, width: int) -> Reassembly:
        """Return the one that leaves ``width`` channels as they are."""
        return cls(torch.arange(width, dtype=torch.int32), torch.ones(width, dtype=torch.int16))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], width: int) -> Reassembly:
        """Return what lies among the tensors of rounded inputs; none where inputs are not reassembled."""
        if "input_groups" not in tensors:
            return cls.none(width)
        return cls(tensors["input_groups"], tensors["input_parts"])

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored of it with rounded inputs, by leaf."""
        return {"input_groups": self.groups, "input_parts": self.parts}

    @property
    def first(self) -> Tensor:
        """Return the first channel that goes into each one, ``(channels,)``."""
        groups = self.groups.long()
        unset = torch.full((int(groups.max()) + 1,), len(groups))
        return unset.scatter_reduce(0, groups, torch.arange(len(groups)), "amin")

    def gathered(self, x: Tensor) -> Tensor:
        """Return the values of the new channels, each part of a split one once, ``(..., in)`` to ``(..., channels)``."""
        groups, first = self.groups.long(), self.first
        further = torch.ones(len(groups), dtype=torch.bool)
        further[first] = False
        values = x[..., first]
        if further.any():
            members = groups.bincount().to(x.dtype)
            values = values.index_add(-1, groups[further], x[..., further]) / members
        return values / self.parts.to(x.dtype)[first]

    def spread(self, values: Tensor) -> Tensor:
        """Return inputs of the plain weight with the same product, ``(..., channels)`` to ``(..., in)``."""
        return values[..., self.groups.long()] * self.parts.to(values.dtype)

    def columns(self, weight: Tensor) -> Tensor:
        """Return the weight that reads the new channels, all parts of each, ``(out, in)`` to ``(out, width)``."""
        summed = weight.new_zeros(len(weight), len(self.first)).index_add(1, self.groups.long(), weight)
        return summed.repeat_interleave(self.parts[self.first].long(), 1)

    def plain(self, columns: Tensor) -> Tensor:
        """Return the weight ``(out, in)`` that makes of :meth:`spread` what ``columns`` ``(out, width)`` makes of parts."""
        groups, parts = self.groups.long(), self.parts.long()
        owner = torch.arange(len(self.first)).repeat_interleave(parts[self.first])  # of each column
        summed = columns.new_zeros(len(columns), len(self.first)).index_add(1, owner, columns)
        share = (
            groups.bincount() * parts[self.first]
        )  # columns of a split channel, or channels that share a column
        return (summed / share.to(columns.dtype))[:, groups]
