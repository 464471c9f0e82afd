"""Rounding that gradients pass straight through: the parts that training with rounded values is made of.

All are functions of tensors. In the forward they return the rounded values exactly as they will be stored or computed
later, so that a trained model and its stored form are one function; in the backward the derivative of rounding, which is
zero almost everywhere, is taken to be one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frugallm.formats.quantized_tensor import ActivationScheme


class _StraightThrough(torch.autograd.Function):
    """``rounded`` forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return ``rounded``, any shape, with the gradient of ``x``, of the same shape."""
    return _StraightThrough.apply(x, rounded)


def round_inputs(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """Return ``x (..., in)`` rounded with one scale a token, with the gradient of ``x``."""
    from frugallm.formats.rounded_inputs import round_activations

    return straight_through(x, round_activations(x.detach(), scheme, {}))
