"""The column solve on grids that are fitted on the way, beside single entries that no grid has to cover."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from frugallm.compress.quantize.solvers import (
    Reached,
    Rounding,
    Values,
    column_order,
    restored,
    solve_columns,
)
from frugallm.formats.extras import KEPT, Entries
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme

#: Takes the columns ``(out, columns)`` of a group, the group's number, and what a squared error costs in each column
#: ``(columns,)``; returns scale and zero point ``(out,)``, in the types in which they are stored.
FitGroup = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor | None]]


def fit_and_compensate(
    weight: Tensor,
    second_moment: Tensor,
    fit: FitGroup,
    scheme: WeightScheme,
    *,
    limit: float | None = None,
    early: bool = False,
    damp: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
    pruned: Tensor | None = None,
) -> QuantizedTensor:
    """Round as :func:`~frugallm.compress.quantize.solvers.compensate` does, fitting grids and sparing entries on the way.

    With ``v`` the mean over columns of ``var(w_j) / U_jj^2``, a squared error in column *j* costs ``1 / (limit v
    U_jj^2)`` (SpQR, arXiv 2306.03078, section 4). An entry whose rounding would cost more than 1 keeps the value that it
    has by then, which is stored beside the codes.

    Parameters
    ----------
    weight, second_moment, damp, act_order, block_size, pruned
        As in ``compensate``.
    fit
        Called once for each group.
    limit
        ``None``: nothing costs anything, and no entry is kept.
    early
        Fit all groups to the weights as they were, instead of each when the first of its columns is reached.
    """
    fitting = _Fitting(
        weight, column_order(second_moment, act_order), fit, scheme, limit, pruned, early=early
    )
    solve_columns(
        weight,
        second_moment,
        fitting.order,
        fitting.begin,
        damp=damp,
        block_size=block_size,
        pruned=pruned,
    )
    return fitting.result()


class _Fitting:
    """The values of a solve whose grids are fitted on the way."""

    def __init__(
        self,
        weight: Tensor,
        order: Tensor,
        fit: FitGroup,
        scheme: WeightScheme,
        limit: float | None,
        pruned: Tensor | None,
        *,
        early: bool,
    ) -> None:
        rows, width = weight.shape
        self.order, self.fit, self.scheme, self.limit, self.pruned = order, fit, scheme, limit, pruned
        self.size = scheme.columns_per_scale(width)
        self.places = order.argsort().view(-1, self.size)
        self.due: dict[int, list[int]] = {}
        for group, first in enumerate(self.places.amin(1).tolist()):
            self.due.setdefault(0 if early else first, []).append(group)
        groups = len(self.places)
        self.grids: list[tuple[Tensor, Tensor | None]] = [(torch.empty(0), None)] * groups
        # The same in float32, read by the solve while they change.
        self.scale = torch.empty(groups, rows)
        self.zero = None if scheme.symmetric else torch.empty(groups, rows)
        self.values = torch.empty(width, rows)
        self.spared = torch.zeros(width, rows, dtype=torch.bool)

    def begin(self, w: Tensor, u: Tensor) -> tuple[Values, Reached]:
        inverse = u.diagonal().square().reciprocal()
        unit = (w.var(1, correction=0) * inverse).mean() * (self.limit or 0.0)
        self.cost = inverse / unit if unit > 0 else torch.zeros_like(inverse)
        groups = (self.order // self.size).tolist()
        self.rounding = Rounding(w, self.scale, self.zero, groups, self.scheme)
        return self.value, Reached(self.due, self.places, self.look)

    def look(self, group: int, values: Tensor) -> None:
        columns = values.T.contiguous()
        if self.pruned is not None:
            columns.masked_fill_(self.pruned[:, group * self.size : (group + 1) * self.size], 0.0)
        scale, zero = self.grids[group] = self.fit(columns, group, self.cost[self.places[group]])
        self.scale[group] = scale
        if self.zero is not None and zero is not None:
            self.zero[group] = zero

    def value(self, column: Tensor, j: int) -> Tensor:
        rounded = self.rounding(column, j)
        if self.limit is None:
            return rounded
        torch.gt((column - rounded).square_().mul_(self.cost[j]), 1.0, out=self.spared[j])
        self.values[j] = column.to(KEPT)
        return torch.where(self.spared[j], self.values[j], rounded)

    def result(self) -> QuantizedTensor:
        codes, spared, values = (
            restored(found, self.order) for found in (self.rounding.codes, self.spared, self.values)
        )
        scale = torch.stack([scale for scale, _ in self.grids], 1)
        zeros = [zero for _, zero in self.grids if zero is not None]
        extras = () if self.limit is None else (Entries.of(spared, values),)
        return QuantizedTensor(codes, scale, torch.stack(zeros, 1) if zeros else None, self.scheme, extras)
