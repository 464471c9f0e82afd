"""Solvers: which grid value each weight gets, given the second moment of the linear's input.

One column solve serves every method that rounds (or prunes) column by column and lets the columns that are still free
make up for the error: OBQ's closed-form update, in GPTQ's fixed order with lazy batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme

_ROWS = 512  # copied, or inverted without further cutting, at once


def inverse_factor(second_moment: Tensor, damp: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """Return the upper Cholesky factor ``U`` of the inverse, ``H^-1 = U^T U``, of the damped second moment.

    Everything happens in the one float64 copy of ``H``: beside ``H`` itself, 14 bytes are needed per entry.

    Parameters
    ----------
    second_moment
        ``H (in, in)``, symmetric. An input that never came (a zero on the diagonal) gets 1 there.
    damp
        Fraction of the mean diagonal added to the diagonal. Where ``H`` is still not positive definite the fraction
        is multiplied by ten until it is.
    order
        Order in which rows and columns are taken; ``None``: as they are.

    Returns
    -------
    tuple
        ``U (in, in)`` float32 and the fraction that was needed.
    """
    # The Cholesky factor of H with rows and columns reversed, H = R R^T with upper R, gives U = R^-1 without H^-1.
    width = second_moment.shape[0]
    backwards = torch.arange(width).flip(0) if order is None else order.flip(0)
    h = torch.empty(width, width, dtype=torch.float64)
    for attempt in range(8):
        added = damp * 10.0**attempt if damp else (0.0 if attempt == 0 else 10.0 ** (attempt - 8))
        for start in range(0, width, _ROWS):
            h[start : start + _ROWS] = second_moment[backwards[start : start + _ROWS]][:, backwards]
        diagonal = h.diagonal()
        diagonal[diagonal == 0] = 1.0
        diagonal += added * diagonal.mean()
        # LAPACK works on columns: the transposed view is the same matrix, and is factorized where it lies.
        lower = h.mT
        _, info = torch.linalg.cholesky_ex(lower, out=(lower, torch.empty((), dtype=torch.int32)))
        if info == 0:
            break
    _invert_lower(lower)
    u = torch.empty(width, width)
    for start in range(0, width, _ROWS):
        u[start : start + _ROWS] = lower[max(width - start - _ROWS, 0) : width - start].flip(0, 1)
    return u, added


def _invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix ``(n, n)`` in place: ``[[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]``."""
    if lower.shape[0] <= _ROWS:
        unit = torch.eye(lower.shape[0], dtype=lower.dtype)
        lower.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
        return
    middle = lower.shape[0] // 2
    a, b, c = lower[:middle, :middle], lower[middle:, middle:], lower[middle:, :middle]
    _invert_lower(a)
    _invert_lower(b)
    torch.mm(b @ c, a, out=c).neg_()


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
    """
    width = weight.shape[1]
    diagonal = second_moment.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(width)
    u, _ = inverse_factor(second_moment, damp, order)
    w = weight.T[order].contiguous()  # (in, out): a column of W is a contiguous row here
    w[diagonal[order] == 0] = 0.0  # no input ever: its weight is free, and is stored as zero
    s, z = scale.float().T.contiguous(), None if zero is None else zero.float().T.contiguous()
    groups = (order // scheme.columns_per_scale(width)).tolist()
    codes = torch.empty_like(w, dtype=torch.int8)
    with _one_thread():
        _round_columns(w, u, s, z, groups, codes, scheme.code_range, block_size)
    back = torch.empty_like(order)
    back[order] = torch.arange(width)
    return QuantizedTensor(codes[back].T.contiguous(), scale, zero, scheme)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: a column is too little work to share, and waiting for each other costs more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _round_columns(
    w: Tensor,
    u: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    groups: list[int],
    codes: Tensor,
    limits: tuple[int, int],
    block_size: int,
) -> None:
    """Fill ``codes`` ``(in, out)`` int8 column by column.

    ``w (in, out)`` and ``u (in, in)`` are in that order too; column ``j`` uses ``scale`` and ``zero (groups, out)`` of
    ``groups[j]``.
    """
    low, high = limits
    width, rows = w.shape
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        block, error = w[start:stop], torch.empty(stop - start, rows)
        for i in range(stop - start):
            j = start + i
            s = scale[groups[j]]
            # Eq. (3) for this column: all errors made so far in the block at once.
            column = torch.addmm(block[i : i + 1], u[start:j, j : j + 1].T, error[:i], alpha=-1)[0]
            q = (column / s).round_()
            z = None if zero is None else zero[groups[j]]
            q = q.clamp_(low, high) if z is None else q.add_(z).clamp_(low, high)
            codes[j] = q
            value = q * s if z is None else (q - z) * s
            torch.sub(column, value, out=error[i]).div_(u[j, j])
        w[stop:].addmm_(u[start:stop, stop:].T, error, alpha=-1)


def proxy_loss(weight: Tensor, stored: Tensor, second_moment: Tensor) -> float:
    """Return ``tr(D H D^T)`` for the error ``D = stored - weight`` ``(out, in)``: the squared error of the layer's output."""
    difference = stored - weight
    return float(((difference @ second_moment) * difference).sum())
