"""Solvers: which value each weight gets, given the second moment of the linear's input.

One column solve serves every method that rounds or prunes column by column and lets the columns that are still free
make up for the error: OBQ's closed-form update, in GPTQ's fixed order with lazy batches. What is done to a column is
two choices: which of its entries are zero (none, given ones, or those that SparseGPT picks), and which values the
others get (their own, or the nearest on a grid).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frugallm.compress.prune.unstructured.masks import Sparsity, lowest
from frugallm.compress.quantize.cholesky import inverse_factor
from frugallm.formats.extras import KEPT, Columns
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.threads import threads

#: Takes column ``j (out,)`` of the solve, and ``j``; returns the values that it gets.
Values = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Reached:
    """Groups of columns that are looked at as they are when the solve has come so far.

    Attributes
    ----------
    due
        Column of the solve to the groups that are looked at before it gets its values.
    places
        Where in the solve the columns of each group stand, ``(groups, columns)``.
    look
        ``look(group, values)`` takes the columns ``(columns, out)`` as they are by then.
    """

    due: Mapping[int, Sequence[int]]
    places: Tensor
    look: Callable[[int, Tensor], None]


def compensate(
    weight: Tensor,
    second_moment: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: WeightScheme,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
    pruned: Tensor | None = None,
    sparsity: Sparsity | None = None,
    kept: Tensor | None = None,
    drift: Tensor | None = None,
) -> QuantizedTensor:
    """Round column by column; after each column the free columns absorb its error (GPTQ, arXiv 2210.17323, eq. 2-4).

    Parameters
    ----------
    weight
        ``W (out, in)`` float32.
    second_moment
        ``H = X^T X (in, in)`` float32 of the input, up to a constant factor.
    scale, zero
        Static grid parameters ``(out, groups)``: column *j* uses those of its own group whatever the order.
    act_order
        Round columns in order of decreasing ``H_jj`` instead of from left to right.
    block_size
        Columns whose updates are applied to the rest in one product; changes speed, not results.
    pruned
        Entries, bool ``(out, in)``, that an earlier step has made zero and that stay zero.
    sparsity
        How many entries become zero on the way, as in :func:`prune_and_compensate`.
    kept
        Columns ``(k,)`` that are not rounded (OWQ, arXiv 2306.02272): they come last, absorb what the others leave, and
        the values that they have then are stored beside the codes.
    drift
        ``(X_o - X)^T X (in, in)`` for inputs ``X`` that were ``X_o``, with the constant factor of ``second_moment``. The
        columns still free then also take over what each column's input has lost (GPTAQ, arXiv 2504.02692).
    """
    width = weight.shape[1]
    order = column_order(second_moment, act_order, kept)
    w, u = _begin(weight, second_moment, order, damp)
    s, z = scale.float().T.contiguous(), None if zero is None else zero.float().T.contiguous()
    rounding = Rounding(w, s, z, (order // scheme.columns_per_scale(width)).tolist(), scheme)
    last = None if kept is None else _KeepLast(rounding, len(kept))
    zeros = _zeros(u, order, block_size, pruned, sparsity)
    pull = _pull(drift, u, order)
    with threads(1):  # a column is too little work to share, and waiting for each other costs more
        _solve_columns(w, u, last or rounding, zeros, block_size, pull=pull)
    extras = () if last is None else (Columns.of(order[last.first :], last.values),)
    return QuantizedTensor(restored(rounding.codes, order), scale, zero, scheme, extras)


def prune_and_compensate(
    weight: Tensor,
    second_moment: Tensor,
    sparsity: Sparsity,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    block_size: int = 128,
) -> Tensor:
    """Make entries zero column by column; the free columns absorb the error (SparseGPT, arXiv 2301.00774, section 3).

    Entries with the smallest ``w^2 / U_jj^2`` become zero, compared as they are when their turn comes: within
    ``block_size`` columns of all rows, or with ``n:m`` within each group.

    Parameters
    ----------
    weight, second_moment
        As in :func:`compensate`.
    act_order
        Take columns in order of decreasing ``H_jj``; not with ``n:m``, whose groups are neighbors from left to right.
    block_size
        Columns that are compared, and whose updates are applied to the rest in one product. With ``n:m`` a multiple
        of ``m``; it then changes speed, not results.

    Returns
    -------
    Tensor
        ``(out, in)`` float32.
    """
    order = column_order(second_moment, act_order)
    w, u = _begin(weight, second_moment, order, damp)
    exact = _Exact(w)
    with threads(1):
        _solve_columns(w, u, exact, _zeros(u, order, block_size, None, sparsity), block_size)
    return restored(exact.values, order)


def solve_columns(
    weight: Tensor,
    second_moment: Tensor,
    order: Tensor,
    choose: Callable[[Tensor, Tensor], tuple[Values, Reached]],
    *,
    damp: float = 0.01,
    block_size: int = 128,
    pruned: Tensor | None = None,
) -> None:
    """Run the column solve with values of the caller's choice.

    Parameters
    ----------
    weight, second_moment, damp, block_size, pruned
        As in :func:`compensate`.
    order
        Columns ``(in,)`` in the order in which they are solved.
    choose
        Is given ``W^T (in, out)`` and the factor ``U (in, in)`` in that order, and says which values columns get.
    """
    w, u = _begin(weight, second_moment, order, damp)
    values, reached = choose(w, u)
    with threads(1):
        _solve_columns(w, u, values, _zeros(u, order, block_size, pruned, None), block_size, reached)


def column_order(second_moment: Tensor, act_order: bool, last: Tensor | None = None) -> Tensor:
    """Return the order in which columns are taken; the columns ``last`` come behind all others."""
    diagonal = second_moment.diagonal()
    order = (
        torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    )
    if last is None:
        return order
    behind = torch.isin(order, last)
    return torch.cat([order[~behind], order[behind]])


def _begin(weight: Tensor, second_moment: Tensor, order: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Return ``W^T (in, out)`` and ``U (in, in)`` in ``order``: a column of ``W`` is a contiguous row here."""
    u, _ = inverse_factor(second_moment, damp, order)
    w = weight.T[order].contiguous()
    w[second_moment.diagonal()[order] == 0] = 0.0  # no input ever: its weight is free, and is stored as zero
    return w, u


def restored(solved: Tensor, order: Tensor) -> Tensor:
    """Return ``(in, out)`` in ``order`` as ``(out, in)`` from left to right."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return solved[back].T.contiguous()


class _Exact:
    """Every column keeps the values that it has by then."""

    def __init__(self, w: Tensor) -> None:
        self.values = torch.empty_like(w)

    def __call__(self, column: Tensor, j: int) -> Tensor:
        self.values[j] = column
        return column


class Rounding:
    """Every column goes to the nearest values on its group's grid: ``scale`` and ``zero (groups, out)`` of ``groups[j]``."""

    def __init__(
        self, w: Tensor, scale: Tensor, zero: Tensor | None, groups: list[int], scheme: WeightScheme
    ) -> None:
        self.scale, self.zero, self.groups, self.scheme = scale, zero, groups, scheme
        self.whole = scheme.zero_dtype == "int8"
        self.codes = torch.empty_like(w, dtype=torch.int8)

    def __call__(self, column: Tensor, j: int) -> Tensor:
        """Return the values of column ``j`` of the solve."""
        s = self.scale[self.groups[j]]
        if self.zero is None:
            q = self.scheme.nearest(column / s)
            self.codes[j] = q
            return self.scheme.values(q) * s
        z, limits = self.zero[self.groups[j]], self.scheme.code_range
        if self.whole:
            q = (column / s).round_().add_(z).clamp_(*limits)
        else:  # codes are whole, not their distance to the zero point
            q = (column / s).add_(z).round_().clamp_(*limits)
        self.codes[j] = q
        return (q - z) * s


class _KeepLast:
    """The last ``count`` columns keep the values that they have by then, as they are stored; the others are rounded."""

    def __init__(self, rounding: Rounding, count: int) -> None:
        width, rows = rounding.codes.shape
        self.rounding, self.first = rounding, width - count
        self.values = torch.empty(count, rows)

    def __call__(self, column: Tensor, j: int) -> Tensor:
        if j < self.first:
            return self.rounding(column, j)
        self.rounding(torch.zeros_like(column), j)  # under them lie the codes of zero
        self.values[j - self.first] = column.to(KEPT)
        return self.values[j - self.first]


@dataclass(frozen=True)
class _Zeros:
    """Which entries are zero, said for ``span`` columns at a time.

    ``pick(values, j)`` takes the columns from ``j`` on as they are by then, ``(columns, out)``, and marks their zeros.
    """

    span: int
    pick: Callable[[Tensor, int], Tensor]


def _zeros(
    u: Tensor, order: Tensor, block_size: int, pruned: Tensor | None, sparsity: Sparsity | None
) -> _Zeros | None:
    if pruned is not None:
        given = pruned.T[order]
        return _Zeros(block_size, lambda values, j: given[j : j + len(values)])
    if sparsity is None or sparsity.share == 0:
        return None
    group, diagonal = sparsity.group, u.diagonal()
    assert group is None or (block_size % group == 0 and bool((order.diff() == 1).all()))

    def smallest(values: Tensor, j: int) -> Tensor:
        scores = (values / diagonal[j : j + len(values), None]).square_()  # (columns, out)
        if group:
            return lowest(scores.T, sparsity.count(group)).T
        return lowest(scores.flatten(), sparsity.count(scores.numel())).view_as(scores)

    return _Zeros(group or block_size, smallest)


def _pull(drift: Tensor | None, u: Tensor, order: Tensor) -> Tensor | None:
    """Return what each later column takes over of a column for its drift, ``(in, in)`` in ``order``.

    Row ``j`` is ``D_j,F (H_FF)^-1`` for the columns ``F`` after ``j``: ``U`` without its first rows is the factor of that.
    """
    return None if drift is None else (drift[order][:, order] @ u.T).triu_(1) @ u


def _solve_columns(
    w: Tensor,
    u: Tensor,
    values: Values,
    zeros: _Zeros | None,
    block_size: int,
    reached: Reached | None = None,
    pull: Tensor | None = None,
) -> None:
    """Give the columns, rows of ``w (in, out)``, their values one after the other; ``u (in, in)`` is in the same order.

    ``pull (in, in)`` says what a column hands on to those after it beside its error, for each unit that it has by then.
    """
    width, rows = w.shape
    error = torch.empty(min(block_size, width), rows)  # of the columns of one block
    turn = None if pull is None else torch.empty_like(error)  # what they had when it was their turn

    def by_now(places: slice | Tensor, start: int, i: int) -> Tensor:
        """Return columns as the first ``i`` of the block have left them: eq. (3) for all errors made so far in it."""
        made = slice(start, start + i)
        now = torch.addmm(w[places], u[made, places].T, error[:i], alpha=-1)
        return now if pull is None or turn is None else now.addmm_(pull[made, places].T, turn[:i])

    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        mask = torch.empty(0)
        for i in range(stop - start):
            j = start + i
            if reached is not None:
                for group in reached.due.get(j, ()):
                    reached.look(group, by_now(reached.places[group], start, i))
            if zeros is not None and i % zeros.span == 0:
                mask = zeros.pick(by_now(slice(j, min(j + zeros.span, stop)), start, i), j)
            column = by_now(slice(j, j + 1), start, i)[0]
            if turn is not None:
                turn[i] = column
            kept = column if zeros is None else column.masked_fill(mask[i % zeros.span], 0.0)
            torch.sub(column, values(kept, j), out=error[i]).div_(u[j, j])
        w[stop:].addmm_(u[start:stop, stop:].T, error[: stop - start], alpha=-1)
        if pull is not None and turn is not None:
            w[stop:].addmm_(pull[start:stop, stop:].T, turn[: stop - start])


def output_energy(weight: Tensor, mean_square: Tensor) -> float:
    """Return ``sum_ij weight_ij^2 mean_square_j``: the output's mean square for inputs that do not correlate.

    Of a difference of two weights it is the error of the output. Where no input ever came, all channels count alike.
    """
    if not mean_square.any():
        mean_square = torch.ones_like(mean_square)
    return float(weight.square().sum(0, dtype=torch.float64) @ mean_square.double())


def proxy_loss(weight: Tensor, stored: Tensor, second_moment: Tensor) -> float:
    """Return ``tr(D H D^T)`` for the error ``D = stored - weight`` ``(out, in)``: the squared error of the layer's output."""
    difference = stored - weight
    return float(((difference @ second_moment) * difference).sum())
