"""What a stored weight has beside codes on a grid: one class for each kind.

The extras of a :class:`~frugallm.formats.quantized_tensor.QuantizedTensor` are applied in order to what its codes stand
for. ``WeightScheme.extras`` names their kinds. Tensors of an extra lie beside those of the codes, under names of their
own, which no other format has; the folder says the kinds in a key that only FrugalLM reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from frugallm.compress.quantize.hadamard import (
    Rotation,
    hadamard_rotation,
    random_hadamard,
    random_kronecker,
    seeded,
)
from frugallm.formats.channels import Reassembly

#: Type of weights that are kept beside the codes: three bits finer than bf16, and no weight is beyond its range.
KEPT = torch.float16


class Extra(ABC):
    """One thing stored beside the codes of a weight ``(out, in)``.

    Attributes
    ----------
    kind
        Its name in schemes and folders.
    leaves
        Names of its tensors behind that of the linear, each beginning with ``weight_``.
    """

    kind: ClassVar[str]
    leaves: ClassVar[tuple[str, ...]]

    @abstractmethod
    def apply(self, weight: Tensor) -> Tensor:
        """Return what ``weight`` ``(out, in)`` float32 becomes; the argument may be changed."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by leaf."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Read back what :meth:`tensors` returned."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Self:
        """Return the same for rows ``start`` to ``stop`` of the weight."""


@dataclass(frozen=True)
class LowRank(Extra):
    """A product of two thin matrices that is added, in 8 bits with a scale for each rank, or in 16 without.

    Attributes
    ----------
    a, b
        ``(out, rank)`` and ``(rank, in)``: int8 codes, or bfloat16.
    scale
        ``(rank,)`` float32, by which codes are multiplied; ``None`` in 16 bits.
    """

    kind: ClassVar[str] = "low_rank"
    leaves: ClassVar[tuple[str, ...]] = ("weight_low_rank_a", "weight_low_rank_b", "weight_low_rank_scale")

    a: Tensor
    b: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, a: Tensor, b: Tensor, bits: int) -> Self:
        """Store ``a (out, rank)`` and ``b (rank, in)`` in 8 or 16 bits."""
        if bits == 16:
            return cls(a.bfloat16(), b.bfloat16())
        sizes = [a.abs().amax(0).clamp(min=1e-12) / 127, b.abs().amax(1).clamp(min=1e-12) / 127]
        codes = (a / sizes[0]).round(), (b / sizes[1][:, None]).round()
        return cls(codes[0].to(torch.int8), codes[1].to(torch.int8), sizes[0] * sizes[1])

    def apply(self, weight: Tensor) -> Tensor:  # noqa: D102
        a = self.a.float() if self.scale is None else self.a.float() * self.scale
        return weight + a @ self.b.float()

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = {"weight_low_rank_a": self.a, "weight_low_rank_b": self.b}
        return found if self.scale is None else {**found, "weight_low_rank_scale": self.scale}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:  # noqa: D102
        a, b = tensors["weight_low_rank_a"], tensors["weight_low_rank_b"]
        return cls(a, b, tensors.get("weight_low_rank_scale"))

    def rows(self, start: int, stop: int) -> Self:  # noqa: D102
        return type(self)(self.a[start:stop].clone(), self.b, self.scale)


@dataclass(frozen=True)
class Columns(Extra):
    """Whole input columns in 16 bits, in the place of what their codes stand for.

    Attributes
    ----------
    index
        ``(k,)`` int32, ascending.
    values
        ``(k, out)`` float16: a column is stored in one piece.
    """

    kind: ClassVar[str] = "columns"
    leaves: ClassVar[tuple[str, ...]] = ("weight_columns", "weight_columns_index")

    index: Tensor
    values: Tensor

    @classmethod
    def of(cls, index: Tensor, values: Tensor) -> Self:
        """Store ``values (k, out)`` of the columns ``index (k,)``, in any order."""
        index, order = index.sort()
        return cls(index.int(), values[order].to(KEPT))

    def apply(self, weight: Tensor) -> Tensor:  # noqa: D102
        weight[:, self.index] = self.values.T.float()
        return weight

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"weight_columns": self.values, "weight_columns_index": self.index}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:  # noqa: D102
        return cls(tensors["weight_columns_index"], tensors["weight_columns"])

    def rows(self, start: int, stop: int) -> Self:  # noqa: D102
        return type(self)(self.index, self.values[:, start:stop].clone())


@dataclass(frozen=True)
class Entries(Extra):
    """Single entries in 16 bits, in the place of what their codes stand for, as sparse rows (CSR).

    Attributes
    ----------
    counts
        How many entries each row has, ``(out,)``: uint16, or int32 where a weight has 65536 columns or more.
    columns
        ``(entries,)`` of the same type.
    values
        ``(entries,)`` float16.
    """

    kind: ClassVar[str] = "entries"
    leaves: ClassVar[tuple[str, ...]] = ("weight_entries", "weight_entries_columns", "weight_entries_counts")

    counts: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def of(cls, mask: Tensor, values: Tensor) -> Self:
        """Store ``values (out, in)`` where ``mask (out, in)`` is true."""
        small = torch.uint16 if mask.shape[1] < 2**16 else torch.int32
        return cls(mask.sum(1).to(small), mask.nonzero()[:, 1].to(small), values[mask].to(KEPT))

    def apply(self, weight: Tensor) -> Tensor:  # noqa: D102
        rows = torch.repeat_interleave(self.counts.long())
        weight[rows, self.columns.long()] = self.values.float()
        return weight

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return dict(zip(self.leaves, (self.values, self.columns, self.counts)))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:  # noqa: D102
        values, columns, counts = (tensors[leaf] for leaf in cls.leaves)
        return cls(counts, columns, values)

    def rows(self, start: int, stop: int) -> Self:  # noqa: D102
        first = int(self.counts[:start].long().sum())
        last = first + int(self.counts[start:stop].long().sum())
        kept = slice(first, last)
        return type(self)(
            self.counts[start:stop].clone(), self.columns[kept].clone(), self.values[kept].clone()
        )


@dataclass(frozen=True)
class Channels(Extra):
    """The codes' columns are those of inputs that are split and shared; this gives the plain ones.

    Attributes
    ----------
    reassembly
        Which channel goes where.
    """

    kind: ClassVar[str] = "channels"
    leaves: ClassVar[tuple[str, ...]] = ("weight_channel_groups", "weight_channel_parts")

    reassembly: Reassembly

    def apply(self, weight: Tensor) -> Tensor:  # noqa: D102
        return self.reassembly.plain(weight)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        # Linears of one site share them in memory, and no two stored tensors may.
        return dict(zip(self.leaves, (self.reassembly.groups.clone(), self.reassembly.parts.clone())))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:  # noqa: D102
        groups, parts = (tensors[leaf] for leaf in cls.leaves)
        return cls(Reassembly(groups, parts))

    def rows(self, start: int, stop: int) -> Self:  # noqa: D102
        return self


@dataclass(frozen=True)
class InputRotation(Extra):
    """The codes are those of the weight in the basis of inputs that are rotated at run time; this turns them back.

    Attributes
    ----------
    order
        ``(1,)`` int32, order of the Hadamard matrix that stands in every block of the rotation.
    """

    kind: ClassVar[str] = "rotation"
    leaves: ClassVar[tuple[str, ...]] = ("weight_rotation",)

    order: Tensor

    @classmethod
    def of(cls, order: int) -> Self:
        """Return the extra of the Hadamard matrix of that order."""
        return cls(torch.tensor([order], dtype=torch.int32))

    @property
    def rotation(self) -> Rotation:
        """The matrix ``R``: inputs ``x`` become ``x R``, and a weight ``W`` is stored as ``W R``."""
        return hadamard_rotation(int(self.order))

    def apply(self, weight: Tensor) -> Tensor:  # noqa: D102
        return self.rotation.undo(weight)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"weight_rotation": self.order}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:  # noqa: D102
        return cls(tensors["weight_rotation"])

    def rows(self, start: int, stop: int) -> Self:  # noqa: D102
        return self


INCOHERENT = ("kronecker", "hadamard")


@dataclass(frozen=True)
class Incoherence(Extra):
    """The codes are those of ``U^T (W diag(D)) V`` with random orthogonal matrices; this turns them back (QuIP).

    Attributes
    ----------
    scale
        ``D (in,)`` float16.
    made
        ``(3,)`` int32: seed of both matrices, place of their kind in ``INCOHERENT``, rows of the weight.
    """

    kind: ClassVar[str] = "incoherence"
    leaves: ClassVar[tuple[str, ...]] = ("weight_incoherence_scale", "weight_incoherence")

    scale: Tensor
    made: Tensor

    @classmethod
    def of(cls, scale: Tensor, rows: int, kind: str, seed: int) -> Self:
        """Return the extra of matrices of one kind, for a weight of so many rows and ``scale (in,)``."""
        return cls(scale.half(), torch.tensor([seed, INCOHERENT.index(kind), rows], dtype=torch.int32))

    @property
    def matrices(self) -> tuple[Rotation, Rotation]:
        """``U`` of the rows and ``V`` of the columns; equal for all weights of one shape, kind and seed."""
        seed, kind, rows = self.made.tolist()
        return _incoherent(rows, kind, seed, "rows"), _incoherent(len(self.scale), kind, seed, "columns")

    def turn(self, weight: Tensor) -> Tensor:
        """Return ``U^T (W diag(D)) V`` for ``weight`` ``(out, in)``: what :meth:`apply` undoes."""
        rows, columns = self.matrices
        return columns.apply(rows.apply((weight * self.scale.to(weight.dtype)).T).T)

    def apply(self, weight: Tensor) -> Tensor:  # noqa: D102
        rows, columns = self.matrices
        return rows.undo(columns.undo(weight).T).T / self.scale.to(weight.dtype)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"weight_incoherence_scale": self.scale, "weight_incoherence": self.made}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:  # noqa: D102
        return cls(tensors["weight_incoherence_scale"], tensors["weight_incoherence"])

    def rows(self, start: int, stop: int) -> Self:
        """Return the same; of a part of the rows there is none, for every row is made of all codes."""
        if (start, stop) != (0, int(self.made[2])):
            raise ValueError("rows of an incoherent weight cannot be told apart: decode all of it")
        return self


@cache
def _incoherent(width: int, kind: int, seed: int, side: str) -> Rotation:
    make = random_kronecker if INCOHERENT[kind] == "kronecker" else random_hadamard
    return make(width, seeded(INCOHERENT[kind], side, width, seed))


EXTRAS: tuple[type[Extra], ...] = (LowRank, Columns, Entries, Channels, InputRotation, Incoherence)
KINDS: dict[str, type[Extra]] = {extra.kind: extra for extra in EXTRAS}
LEAVES = tuple(leaf for extra in KINDS.values() for leaf in extra.leaves)
