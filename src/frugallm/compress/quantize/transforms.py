"""Rewrites that leave a model's function unchanged: scales moved from where a value is written to where it is read.

Every function takes and returns tensors and touches no module. With ``y = x W^T``, dividing channel *j* of ``x`` by
``s_j`` and multiplying column *j* of ``W`` by ``s_j`` changes nothing; the division is folded into whatever wrote ``x``.
With ``y = x W^T + b``, taking ``z`` away from ``x`` and adding ``W z`` to ``b`` changes nothing either.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_columns(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply the input channels of ``weight`` ``(out, in)`` by ``scale`` ``(in,)``."""
    return weight * scale.to(weight.dtype)


def scale_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """Divide the output rows of ``weight`` ``(out, in)``, or of a bias ``(out,)``, by ``scale`` ``(out,)``."""
    scale = scale.to(weight.dtype)
    return weight / (scale[:, None] if weight.ndim == 2 else scale)


def tie_over_group(scale: Tensor, head_dim: int, repeats: int) -> Tensor:
    """Make a scale of attention outputs legal for grouped heads.

    Column ``(head, d)`` of the output projection reads row ``(head // repeats, d)`` of the value projection, so the
    scale must be equal over the ``repeats`` query heads of one value head; their geometric mean is taken.

    Parameters
    ----------
    scale
        ``(heads * head_dim,)``, positive.

    Returns
    -------
    Tensor
        ``(kv_heads * head_dim,)``, one entry per row of the value projection.
    """
    return scale.view(-1, repeats, head_dim).log().mean(1).exp().reshape(-1)


def repeat_over_group(scale: Tensor, head_dim: int, repeats: int) -> Tensor:
    """Spread a scale of value rows ``(kv_heads * head_dim,)`` over the query heads ``(heads * head_dim,)``."""
    return scale.view(-1, 1, head_dim).expand(-1, repeats, head_dim).reshape(-1)


def tie_shift_over_group(shift: Tensor, head_dim: int, repeats: int) -> Tensor:
    """Make a shift of attention outputs ``(heads * head_dim,)`` legal for grouped heads, as :func:`tie_over_group`.

    The mean over the query heads of each value head is taken; the result is ``(kv_heads * head_dim,)``.
    """
    return shift.view(-1, repeats, head_dim).mean(1).reshape(-1)


def absorb_shift(bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """Return the bias ``(out,)`` of a linear ``weight (out, in)`` whose input has lost ``shift`` ``(in,)``."""
    return bias + (weight.double() @ shift.double()).to(bias.dtype)


def fold_gain(gain: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Move a norm's gain ``(in,)`` into the linears ``(out, in)`` that read it; the gain that remains is all ones."""
    return torch.ones_like(gain), [scale_columns(w, gain) for w in weights]
