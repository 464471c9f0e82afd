"""The same function in another basis: the residual stream and the values of every head turned by orthogonal matrices.

Whatever is written to the residual stream is multiplied by one matrix ``Q``, and whatever reads it undoes that. A norm
lies in between: without its gain an RMSNorm commutes with every ``Q``, and a LayerNorm with every ``Q`` that keeps the
mean over the channels. So gains are first moved into the linears that read them, the final one into the head, which
therefore cannot stay tied to the embedding.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Literal

import torch
from torch import Tensor

from frugallm.compress.quantize.hadamard import (
    Rotation,
    keeping_the_mean,
    random_hadamard,
    random_orthogonal,
    seeded,
)
from frugallm.errors import ModelError
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.family import Site, Sublayer, writing_rows
from frugallm.models.rewritten import Rewritten

Kind = Literal["hadamard", "orthogonal"]

_ROWS = 4096  # of a table, rotated at once


class Rotated(Rewritten):
    """Another checkpoint's function in a rotated basis, computed tensor by tensor as it is read (in float64).

    Parameters
    ----------
    base
        A checkpoint of a family whose residual stream can be rotated.
    seed
        Chooses the matrices.
    kind
        Hadamard matrices with random signs, or uniformly distributed orthogonal ones.
    heads
        Whether values are rotated as well, within each head.

    Raises
    ------
    ModelError
        If the function would change; one line says why.
    """

    def __init__(
        self, base: Checkpoint, seed: int = 0, *, kind: Kind = "hadamard", heads: bool = True
    ) -> None:
        super().__init__(base)
        self.config = copy.deepcopy(base.config)
        self.config.tie_word_embeddings = False
        self._identity = f"rotated {kind} heads {heads} seed {seed}"
        self._seed, self._kind, self._turn_heads = seed, kind, heads
        self._head = f"{self.family.head}.weight"
        self._table = f"{self.family.embedding}.weight"
        self._final = self.family.final_norm
        self._graphs = [self.family.graph(base.config, i) for i in range(base.config.num_hidden_layers)]
        self._centered = (
            f"{self._final}.bias" in base.names()
        )  # a LayerNorm subtracts the mean, an RMSNorm does not
        self._check()
        width, place = self.config.hidden_size, seeded(seed, "residual")
        if self._centered:
            self._residual = keeping_the_mean(width, place, dense=kind == "orthogonal")
        else:
            self._residual = self._draw(width, place)

    def _draw(self, width: int, generator: torch.Generator) -> Rotation:
        make = random_hadamard if self._kind == "hadamard" else random_orthogonal
        return make(width, generator)

    def names(self) -> list[str]:  # noqa: D102
        return sorted({*self._base.names(), self._head})

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._base.shape(self._source(name))

    def where(self, name: str) -> str:  # noqa: D102
        return self._base.where(self._source(name))

    def digest(self) -> str:  # noqa: D102
        return hashlib.sha256(f"{self._identity} of {self._base.digest()}".encode()).hexdigest()

    def _source(self, name: str) -> str:
        """Return the name in the base: a tied head is the embedding there."""
        return self._table if name == self._head and self._base.config.tie_word_embeddings else name

    # -- what can be rotated ---------------------------------------------------------------------------------------

    def _check(self) -> None:
        width = self.config.hidden_size
        for name in self._base.names():
            match = self._in_block.fullmatch(name)
            if match is not None:
                self._check_place(int(match[1]), match[2], name)
            elif not name.startswith(f"{self._final}.") and self._base.shape(name)[1:] != (width,):
                raise self._refusal(f"{name} is not {width} wide, as the residual stream is")
        for norm in self._norms():
            self._check_gain(norm)

    def _check_place(self, index: int, module: str, name: str) -> None:
        """Refuse a tensor of a block that is neither in a sublayer nor the norm in front of one."""
        for sub in self._graphs[index]:
            if module == sub.reads.writer or any(f"{module}.".startswith(f"{m}.") for m in sub.modules):
                return
        raise self._refusal(f"{name} acts on what a sublayer adds to it, and no linear can take it up")

    def _norms(self) -> list[str]:
        """Return the full names of all norms in front of something that reads the residual stream."""
        inside = [
            f"{self.family.block(index)}.{sub.reads.writer}"
            for index, graph in enumerate(self._graphs)
            for sub in graph
        ]
        return [*dict.fromkeys(inside), self._final]

    def _check_gain(self, norm: str) -> None:
        """Refuse a bias behind a gain of zero: what the norm adds there cannot be said in front of the gain."""
        if f"{norm}.bias" in self._base.names():
            lost = (self._gain(norm) == 0) & (self._base.tensor(f"{norm}.bias") != 0)
            if bool(lost.any()):
                raise self._refusal(
                    f"channel {int(lost.nonzero()[0])} of {norm} has a bias and a gain of zero"
                )

    def _refusal(self, why: str) -> ModelError:
        return ModelError(
            f"{self.name} ({self.config.model_type}): its residual stream cannot be rotated: {why}",
            "Leave rotate out of the recipe",
        )

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _read(self, name: str, start: int | None, stop: int | None) -> Tensor:
        match = self._in_block.fullmatch(name)
        if match is None:
            return self._outside(name, start, stop)
        tensor = self._inside(int(match[1]), match[2], match[3], self._base.tensor(name).double())
        return tensor[start:stop].float().contiguous()

    def _outside(self, name: str, start: int | None, stop: int | None) -> Tensor:
        """Return the final norm, or rows of the head, or of a table that is added to the stream; some rows at a time."""
        if name.startswith(f"{self._final}."):
            return self._norm(self._final, name.rpartition(".")[2])[start:stop].float()
        first, last = start or 0, self.shape(name)[0] if stop is None else stop
        found = torch.empty(last - first, self.shape(name)[1])
        for at in range(first, last, _ROWS):
            rows = self._base._read(self._source(name), at, min(at + _ROWS, last)).double()
            if name == self._head:
                rows = rows * self._gain(self._final).double()
            found[at - first : at - first + len(rows)] = self._residual.apply(rows)
        return found

    def _inside(self, index: int, module: str, leaf: str, tensor: Tensor) -> Tensor:
        for sub in self._graphs[index]:
            norm = f"{self.family.block(index)}.{sub.reads.writer}"
            if module == sub.reads.writer:
                return self._norm(norm, leaf)
            if module in (*sub.reads.linears, *sub.reads.others) and leaf == "weight":
                tensor = self._residual.apply(tensor * self._gain(norm).double())
            for site in sub.outputs:
                tensor = self._around(index, sub, site, module, tensor)
        return tensor

    def _around(self, index: int, sub: Sublayer, site: Site, module: str, tensor: Tensor) -> Tensor:
        """Rotate what the site's linears write to the stream, and the values between its writer and them."""
        turns = self._turn_heads and sub.attention and site.writer_kind == "heads"
        if turns and module == site.writer:
            tensor = self._write_values(index, site, tensor)
        if module not in site.linears:
            return tensor
        if turns and tensor.ndim == 2:
            by_head = tensor.reshape(len(tensor), self._heads.query, self._heads.width)
            tensor = self._values(index).apply(by_head).reshape(tensor.shape)
        return self._residual.apply(tensor.T).T if tensor.ndim == 2 else self._residual.apply(tensor)

    def _write_values(self, index: int, site: Site, tensor: Tensor) -> Tensor:
        """Rotate the value rows of a weight ``(out, in)`` or a bias ``(out,)`` within each head."""
        rows = writing_rows(site, len(tensor), self._heads)
        by_head = tensor[rows].view(self._heads.values, self._heads.width, -1)
        turned = self._values(index).apply(by_head.mT).mT
        tensor = tensor.clone()
        tensor[rows] = turned.reshape(tensor[rows].shape)
        return tensor

    def _values(self, index: int) -> Rotation:
        """Return the matrix of the values of block ``index``, equal for all heads: query heads share them."""
        return self._draw(self._heads.width, seeded(self._seed, "values", index))

    def _gain(self, norm: str) -> Tensor:
        return self._base.tensor(f"{norm}.weight").float() + self.family.gain_offset

    def _norm(self, norm: str, leaf: str) -> Tensor:
        """Return what is left of a norm: a gain of one and, in front of the gain that it had, its bias rotated."""
        if leaf == "weight":
            return torch.full_like(self._gain(norm), 1.0 - self.family.gain_offset)
        bias, gain = self._base.tensor(f"{norm}.bias").double(), self._gain(norm).double()
        return self._residual.apply(torch.where(bias == 0, bias, bias / gain))
