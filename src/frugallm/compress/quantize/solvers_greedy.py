"""Greedy solvers: every row takes its entries in the order in which they cost least.

:mod:`~frugallm.compress.quantize.solvers` takes the columns in one order for all rows, so that one factor of the inverse
serves the whole weight. Here (Optimal Brain Compression, arXiv 2208.11580) each row chooses for itself which of its
entries is rounded, or made zero, next; those that are still free make up for it. So each row has an inverse of its own,
and the work is ``out in^3`` instead of ``out in^2``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from frugallm.compress.prune.unstructured.masks import Sparsity, lowest
from frugallm.compress.quantize.cholesky import damp_diagonal, inverse_factor
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme

#: Entries of the inverses that are held at once.
ENTRIES_AT_ONCE = 2**24
_LAZY = 32  # steps that are applied to the inverses in one product
_FEW = 64  # entries of a row that are not worth narrowing further


def quantize_greedily(
    weight: Tensor,
    second_moment: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: WeightScheme,
    *,
    damp: float = 0.01,
    pruned: Tensor | None = None,
    order: Tensor | None = None,
) -> QuantizedTensor:
    """Round each row entry by entry, the one that costs least first (OBQ, arXiv 2208.11580, eq. 7 and section 5).

    The cost of an entry is ``(w - quant(w))^2 / [H^-1]_jj``, with the inverse over the entries that are still free. An
    entry that has left the grid's range, by more than half a step, goes before all others, the farthest first.

    Parameters
    ----------
    weight
        ``W (out, in)`` float32; in float64 everything is computed so.
    second_moment
        ``H = X^T X (in, in)`` float32 of the input, up to a constant factor.
    scale, zero
        Grid parameters ``(out, groups)``; zero points are whole.
    damp
        As in :func:`~frugallm.compress.quantize.cholesky.inverse_factor`.
    pruned
        Entries, bool ``(out, in)``, that are zero and stay zero: they are taken out of ``H`` before anything is rounded.
    order
        Columns ``(in,)`` in the order in which every row shall take them instead; in this way it is GPTQ.
    """
    per_scale = scheme.columns_per_scale(weight.shape[1])
    inverse, h = _inverse(second_moment, damp, weight.dtype)
    w = _alive(weight, second_moment)
    rank = None if order is None else order.argsort().to(weight.dtype)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for some in _chunks(weight):
        grid = _Grid(scale[some].to(w.dtype), None if zero is None else zero[some], per_scale, scheme)
        first = None if pruned is None else pruned[some]
        _quantize_rows(codes[some], _Rows(w[some], inverse, h), grid, first, rank)
    return QuantizedTensor(codes, scale, zero, scheme)


def prune_greedily(
    weight: Tensor, second_moment: Tensor, sparsity: Sparsity, *, damp: float = 0.01
) -> Tensor:
    """Make entries zero one by one, the one that costs least first (ExactOBS, arXiv 2208.11580, section 4).

    The cost of an entry is ``w^2 / [H^-1]_jj``, with the inverse over the entries that are still there. With ``n:m`` the
    entries of a group are safe when ``n`` of it are gone. Otherwise every row is followed to its end, and then zeros are
    dealt out over all rows, always to the row whose next one costs least. What stays gets its best values.

    Parameters
    ----------
    weight, second_moment, damp
        As in :func:`quantize_greedily`.

    Returns
    -------
    Tensor
        ``(out, in)`` of the type of ``weight``.
    """
    inverse, h = _inverse(second_moment, damp, weight.dtype)
    w = _alive(weight, second_moment)
    width, group = w.shape[1], sparsity.group
    steps = width // group * sparsity.count(group) if group else width
    order = torch.empty(len(weight), steps, dtype=torch.int64)
    costs = torch.empty(len(weight), steps, dtype=weight.dtype)
    for some in _chunks(weight):
        _prune_rows(order[some], costs[some], _Rows(w[some], inverse, h), sparsity)
    gone = torch.ones_like(order, dtype=torch.bool) if group else _dealt_out(costs, sparsity)
    zeros = torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, order, gone)
    return refit(w, h, zeros)


def refit(weight: Tensor, h: Tensor, zeros: Tensor) -> Tensor:
    """Return ``weight`` with given ``zeros`` and the values elsewhere that make up for them best.

    ``w_S + H_SS^-1 H_SZ w_Z`` for the entries ``S`` of a row that stay and the ``Z`` that go.

    Parameters
    ----------
    weight
        ``(out, in)``.
    h
        ``(in, in)`` float64, positive definite.
    zeros
        bool ``(out, in)``.
    """
    fitted = weight.masked_fill(zeros, 0.0)
    for row, old, gone in zip(fitted, weight, zeros):
        stays = (~gone).nonzero()[:, 0]
        lines = h[stays]
        factor = torch.linalg.cholesky(lines[:, stays])
        pull = lines @ old.double().masked_fill(~gone, 0.0)
        row[stays] += torch.cholesky_solve(pull[:, None], factor)[:, 0].to(row.dtype)
    return fitted


def _inverse(second_moment: Tensor, damp: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the inverse of the damped second moment, and the damped second moment in float64, both ``(in, in)``."""
    u, added = inverse_factor(second_moment, damp)
    inverse = u.double()
    inverse = (inverse.T @ inverse).to(dtype)
    h = second_moment.to(torch.float64, copy=True)
    damp_diagonal(h.diagonal(), added)
    return inverse, h


def _alive(weight: Tensor, second_moment: Tensor) -> Tensor:
    """Return a copy with zeros where no input ever came: such a weight is free."""
    return weight.masked_fill(second_moment.diagonal() == 0, 0.0)


def _chunks(weight: Tensor) -> Iterator[slice]:
    """Yield rows whose inverses fit the workspace together."""
    rows = max(1, ENTRIES_AT_ONCE // weight.shape[1] ** 2)
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


class _Rows:
    """Some rows of a weight, each with its inverse of ``H`` over the entries that are still free.

    To take an entry is one step of elimination in that inverse, ``A <- A - a_p a_p^T / A_pp``. Steps are kept as
    ``lines`` and brought into the inverses some at a time, in one product; until then only the diagonal and the line of
    the entry that is taken are made up to date. Entries that are taken stay in place until :meth:`narrow` drops them.

    Attributes
    ----------
    w
        Values as they are by now, ``(rows, free)``.
    columns
        Where in the weight each entry stands, ``(rows, free)``.
    diagonal
        Of the inverses, ``(rows, free)``.
    taken
        Entries that are taken since the last narrowing, bool ``(rows, free)``.
    each
        Numbers of the rows ``(rows,)``, to pick one entry of each.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, h: Tensor) -> None:
        rows, width = weight.shape
        self.each = torch.arange(rows)
        self.w = weight.clone()
        self.columns = torch.arange(width).repeat(rows, 1)
        self.diagonal = inverse.diagonal().repeat(rows, 1)
        # [A^-1]_jj is never below 1 / A_jj: where much cancels, that keeps round-off from making it nothing.
        self.least = (1 / h.diagonal()).to(weight.dtype).repeat(rows, 1)
        self.inverses = inverse.repeat(rows, 1, 1)
        self._begin()

    def _begin(self) -> None:
        self.taken = torch.zeros(self.w.shape, dtype=torch.bool)
        self.lines = self.w.new_empty(len(self.w), _LAZY, self.w.shape[1])
        self.kept = self.steps = 0

    @property
    def due(self) -> int:
        """How many entries to take before the next narrowing: all if they are few, or half of them."""
        free = self.w.shape[1]
        return free if free <= _FEW else free // 2

    def take(self, place: Tensor, error: Tensor) -> None:
        """Take the entry at ``place (rows,)`` of each row, less ``error (rows,)``; those still free make up for that."""
        line = self.inverses[self.each, place]
        if self.kept:
            lines = self.lines[:, : self.kept]
            line = torch.baddbmm(line[:, None], lines[self.each, :, place][:, None], lines, alpha=-1)[:, 0]
        root = self.diagonal[self.each, place].sqrt()[:, None]
        line /= root
        self.w.addcmul_(line, error[:, None] / root, value=-1)
        self.diagonal.addcmul_(line, line, value=-1)
        torch.maximum(self.diagonal, self.least, out=self.diagonal)
        self.taken[self.each, place] = True
        self.lines[:, self.kept] = line
        self.kept, self.steps = self.kept + 1, self.steps + 1
        if self.kept == _LAZY:
            self._bring_in()

    def _bring_in(self) -> None:
        if self.kept:
            lines = self.lines[:, : self.kept]
            self.inverses.baddbmm_(lines.mT, lines, alpha=-1)
            self.kept = 0

    def narrow(self) -> None:
        """Drop what is taken."""
        self._bring_in()
        free = self.w.shape[1] - self.steps
        stays = (~self.taken).nonzero()[:, 1].view(len(self.w), free)
        inverses = self.inverses.new_empty(len(self.w), free, free)
        for narrower, inverse, some in zip(inverses, self.inverses, stays):
            torch.index_select(inverse[some], 1, some, out=narrower)
        self.inverses = inverses
        self.w, self.columns = self.w.gather(1, stays), self.columns.gather(1, stays)
        self.diagonal, self.least = self.diagonal.gather(1, stays), self.least.gather(1, stays)
        self._begin()


def _quantize_rows(
    codes: Tensor, rows: _Rows, grid: _Grid, pruned: Tensor | None, rank: Tensor | None
) -> None:
    """Fill ``codes`` of these rows; what is ``pruned`` goes first, ``rank (in,)`` says the order if it is given."""
    while rows.w.shape[1]:
        scale, zero = grid.of(rows.columns)
        first = None if pruned is None else pruned.gather(1, rows.columns)
        for _ in range(rows.due):
            exact = rows.w / scale
            code = exact.round().add_(zero).clamp_(*grid.limits)
            off = exact.sub_(code - zero)  # in steps of the grid
            error = off * scale
            size = error.square()
            cost = torch.where(off.abs() > 0.5, -size, size / rows.diagonal)
            if first is not None:
                cost.masked_fill_(first, -torch.inf)
            if rank is not None:
                cost = rank[rows.columns]
            place = cost.masked_fill_(rows.taken, torch.inf).argmin(1)
            codes[rows.each, rows.columns[rows.each, place]] = code[rows.each, place].to(torch.int8)
            rows.take(place, error[rows.each, place])
        rows.narrow()


class _Grid:
    """Scales and zero points of the groups of some rows, ``(rows, groups)``."""

    def __init__(self, scale: Tensor, zero: Tensor | None, per_scale: int, scheme: WeightScheme) -> None:
        self.scale, self.zero = scale, torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
        self.per_scale, self.limits = per_scale, scheme.code_range

    def of(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales and zero points of entries in ``columns (rows, free)``."""
        group = columns // self.per_scale
        return self.scale.gather(1, group), self.zero.gather(1, group)


def _prune_rows(order: Tensor, costs: Tensor, rows: _Rows, sparsity: Sparsity) -> None:
    """Fill ``order`` and ``costs (rows, steps)``: which columns of these rows become zero one after the other."""
    done, steps = 0, order.shape[1]
    size = sparsity.group or rows.w.shape[1]
    allowed = sparsity.count(size) if sparsity.group else size
    gone = torch.zeros(len(rows.w), rows.w.shape[1] // size, dtype=torch.int64)
    while done < steps:
        group = rows.columns // size
        for _ in range(min(rows.due, steps - done)):
            cost = rows.w.square() / rows.diagonal
            cost.masked_fill_(rows.taken | (gone >= allowed).gather(1, group), torch.inf)
            costs[:, done], place = cost.min(1)
            order[:, done] = rows.columns[rows.each, place]
            gone[rows.each, group[rows.each, place]] += 1
            rows.take(place, rows.w[rows.each, place])
            done += 1
        rows.narrow()


def _dealt_out(costs: Tensor, sparsity: Sparsity) -> Tensor:
    """Return which ``steps`` of each row are done, bool, when every zero goes to the row whose next one costs least."""
    # A step behind a dearer one is only reached once that one is paid, and is then done at once.
    dues = costs.cummax(1).values
    return lowest(dues.flatten(), sparsity.count(costs.numel())).view_as(costs)
