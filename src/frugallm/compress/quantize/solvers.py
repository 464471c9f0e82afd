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


def inverse_factor(second_moment: Tensor, damp: float) -> tuple[Tensor, float]:
    """Return the upper Cholesky factor ``U`` of the inverse, ``H^-1 = U^T U``, of the damped second moment.

    Parameters
    ----------
    second_moment
        ``H (in, in)``, symmetric, without dead (zero) diagonal entries.
    damp
        Fraction of the mean diagonal added to the diagonal. Where ``H`` is still not positive definite the fraction
        is multiplied by ten until it is.

    Returns
    -------
    tuple
        ``U (in, in)`` float32 and the fraction that was needed.
    """
    # The Cholesky factor of H with rows and columns reversed, H = R R^T with upper R, gives U = R^-1 without H^-1.
    h = second_moment.flip(0, 1).double()
    del second_moment
    mean = h.diagonal().mean()
    added = 0.0
    for attempt in range(8):
        wanted = damp * 10.0**attempt if damp else (0.0 if attempt == 0 else 10.0 ** (attempt - 8))
        h.diagonal().add_((wanted - added) * mean)
        added = wanted
        lower, info = torch.linalg.cholesky_ex(h)
        if info == 0:
            break
    torch.eye(h.shape[0], dtype=h.dtype, out=h)
    torch.linalg.solve_triangular(lower, h, upper=False, out=h)
    del lower
    return h.float().flip(0, 1), added


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
    per_scale = scheme.columns_per_scale(width)
    diagonal = second_moment.diagonal()
    dead = diagonal == 0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(width)

    u, _ = inverse_factor(_ordered(second_moment, order, dead), damp)
    w = weight.T[order].contiguous()  # (in, out): a column of W is a contiguous row here
    w[dead[order]] = 0.0
    s = scale.float().T[order // per_scale]  # (in, out)
    z = None if zero is None else zero.float().T[order // per_scale]
    codes = torch.empty_like(w)
    with _one_thread():
        _round_columns(w, u, s, z, codes, scheme.code_range, block_size)
    back = torch.empty_like(order)
    back[order] = torch.arange(width)
    return QuantizedTensor(codes[back].T.contiguous().to(torch.int8), scale, zero, scheme)


def _ordered(second_moment: Tensor, order: Tensor, dead: Tensor) -> Tensor:
    """Return a copy of ``H`` with rows and columns in ``order``."""
    h = second_moment[order][:, order]
    h.diagonal()[dead[order]] = 1.0  # no input ever: its weight is free, and is stored as zero
    return h


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
    w: Tensor, u: Tensor, s: Tensor, z: Tensor | None, codes: Tensor, limits: tuple[int, int], block_size: int
) -> None:
    """Fill ``codes`` ``(in, out)`` column by column; ``w``, ``s`` and ``z`` ``(in, out)`` are in that order too."""
    low, high = limits
    width, rows = w.shape
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        block, error = w[start:stop], torch.empty(stop - start, rows)
        for i in range(stop - start):
            j = start + i
            # Eq. (3) for this column: all errors made so far in the block at once.
            column = torch.addmm(block[i : i + 1], u[start:j, j : j + 1].T, error[:i], alpha=-1)[0]
            q = (column / s[j]).round_()
            q = q.clamp_(low, high) if z is None else q.add_(z[j]).clamp_(low, high)
            codes[j] = q
            value = q * s[j] if z is None else (q - z[j]) * s[j]
            torch.sub(column, value, out=error[i]).div_(u[j, j])
        w[stop:].addmm_(u[start:stop, stop:].T, error, alpha=-1)


def proxy_loss(weight: Tensor, stored: Tensor, second_moment: Tensor) -> float:
    """Return ``tr(D H D^T)`` for the error ``D = stored - weight`` ``(out, in)``: the squared error of the layer's output."""
    difference = stored - weight
    return float(((difference @ second_moment) * difference).sum())
