"""What an :class:`~frugallm.formats.quantized_tensor.ActivationScheme` means: how inputs of linears are rounded.

Engines multiply by integer kernels, or in another basis; here the same is said as a map of inputs ``(..., in)`` to inputs
``(..., in)`` in front of a plain linear, so that any model can be evaluated as it is stored. What the map needs beside
the scheme are stored tensors, by the ends of their names (``input_scale``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frugallm.compress.quantize.hadamard import hadamard_rotation
from frugallm.formats import levels
from frugallm.formats.channels import Reassembly
from frugallm.formats.quantized_tensor import ActivationScheme

if TYPE_CHECKING:
    from torch import nn

#: Stored tensors of rounded inputs, by the ends of their names.
LEAVES = ("input_scale", "input_clusters", "input_zero_point", "input_groups", "input_parts")


def nearest(x: Tensor) -> Tensor:
    """Return ``x`` rounded to whole numbers; gradients pass as if it were not, the values are the same."""
    return _straight(x, x.round())


def _straight(x: Tensor, rounded: Tensor) -> Tensor:
    """Return ``rounded`` with the gradient of ``x``; what ``x`` is rounded to whole numbers stays the same to the bit."""
    return x + (rounded - x).detach() if x.requires_grad else rounded


def round_activations(x: Tensor, scheme: ActivationScheme, parameters: Mapping[str, Tensor]) -> Tensor:
    """Round ``x (..., in)`` as engines do at run time: symmetric, one scale a tensor (stored) or a token (from ``x``).

    The scale of a token puts its largest magnitude on ``(2^b - 1) / 2``, or on the largest value of a float grid, as in
    compressed-tensors; beside outliers on ``2^(b-1) - 1``, as in bitsandbytes. With clusters, each channel has the
    grid of its cluster.
    """
    if scheme.reassembled:
        channels = Reassembly.of(parameters, x.shape[-1])
        alone = scheme.model_copy(update={"reassembled": False})
        return channels.spread(round_activations(channels.gathered(x.float()), alone, parameters)).to(x.dtype)
    if scheme.rotation is not None:
        rotation = hadamard_rotation(scheme.rotation)
        inside = scheme.model_copy(update={"rotation": None})
        return rotation.undo(round_activations(rotation.apply(x.float()), inside, parameters)).to(x.dtype)
    last = 2 ** (scheme.bits - 1) - 1
    if scheme.clusters is not None:
        return _round_by_cluster(x, last, parameters)
    if scheme.outliers is not None:
        return _round_beside_outliers(x, scheme.outliers, last)
    if scheme.dynamic:
        scale = x.float().abs().amax(-1, keepdim=True) / scheme.reach
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    else:
        scale = parameters["input_scale"]
    if scheme.grid != "int":
        exact = x.float() / scale
        return (_straight(exact, levels.nearest_values(exact, scheme.grid)) * scale).to(x.dtype)
    return (nearest(x.float() / scale).clamp(-last - 1, last) * scale).to(x.dtype)


def _round_by_cluster(x: Tensor, last: int, parameters: Mapping[str, Tensor]) -> Tensor:
    """Round ``x (..., in)`` on the grid of each channel's cluster.

    Stored are ``input_clusters (in,)`` uint8, and by cluster ``input_scale (clusters,)`` float32 and ``input_zero_point
    (clusters,)`` int16, which may lie outside the codes.
    """
    cluster = parameters["input_clusters"].long()
    scale, zero = parameters["input_scale"][cluster], parameters["input_zero_point"][cluster]
    codes = (nearest(x.float() / scale) + zero).clamp(-last - 1, last)
    return ((codes - zero) * scale).to(x.dtype)


def _round_beside_outliers(x: Tensor, threshold: float, last: int) -> Tensor:
    """Round ``x (..., in)`` to ``last`` codes either side, one scale a token, except channels with an outlier.

    As bitsandbytes does it: a channel is left as it is in all tokens of the call if any of them reaches ``threshold``
    there; the scale of a token covers all of its values that do not, those in such channels included.
    """
    outlier = x.abs() >= threshold
    left = outlier.flatten(0, -2).any(0)  # (in,)
    scale = x.float().masked_fill(outlier, 0).abs().amax(-1, keepdim=True) / last
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.where(left, x, (nearest(x.float() / scale) * scale).to(x.dtype))


def static_scale(absmax: Tensor, scheme: ActivationScheme) -> Tensor:
    """Return the one scale ``(1,)`` float32 of a static input with channel maxima ``absmax (in,)``."""
    return (absmax.max().clamp(min=1e-8) / scheme.reach).reshape(1)


def round_inputs(linear: nn.Module, scheme: ActivationScheme, parameters: Mapping[str, Tensor]) -> None:
    """Round the inputs of ``linear`` from now on."""
    linear.register_forward_pre_hook(lambda _, inputs: (round_activations(inputs[0], scheme, parameters),))
