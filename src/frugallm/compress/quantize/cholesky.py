"""The Cholesky factor of the inverse of a second moment, with little memory beside it."""

from __future__ import annotations

import torch
from torch import Tensor

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
        damp_diagonal(h.diagonal(), added)
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


def damp_diagonal(diagonal: Tensor, added: float) -> None:
    """Add a fraction of its mean to the diagonal ``(in,)`` of a second moment, in place; what is zero there becomes 1."""
    diagonal[diagonal == 0] = 1.0
    diagonal += added * diagonal.mean()


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
