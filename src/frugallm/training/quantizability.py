"""How hard a model is to quantize: what its inputs of linears look like, measured without rounding anything."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frugallm.training.linears import block_linears

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from frugallm.models.family import Family


@dataclass(frozen=True)
class Spread:
    """How uneven the inputs of one linear are.

    Attributes
    ----------
    kurtosis
        Fourth central moment over the squared variance, all values together; 3 for a normal distribution.
    channel_ratio
        Largest magnitude of a channel, the largest of all channels over their median.
    """

    kurtosis: float
    channel_ratio: float


def spread(inputs: Tensor) -> Spread:
    """Return the spread of ``inputs (tokens, in)``."""
    values = inputs.double()
    centred = values - values.mean()
    variance = centred.square().mean().clamp(min=1e-30)
    largest = values.abs().amax(0)
    ratio = largest.amax() / largest.median().clamp(min=1e-30)
    return Spread(float(centred.pow(4).mean() / variance.square()), float(ratio))


@torch.inference_mode()
def input_spreads(student: PreTrainedModel, family: Family, windows: Tensor) -> dict[str, Spread]:
    """Return the spread of the inputs of every linear of the blocks, by full name, over ``windows (windows, length)``."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept[name] = inputs[0].reshape(-1, inputs[0].shape[-1])

        return hook

    linears = block_linears(student, family)
    hooks = [m.register_forward_pre_hook(keep(name)) for name, m in linears.items()]  # type: ignore[arg-type]
    try:
        student(input_ids=windows, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: spread(inputs) for name, inputs in kept.items()}


def summary(spreads: dict[str, Spread]) -> dict[str, float]:
    """Return the mean kurtosis, the largest, and the mean ratio of channels."""
    kurtosis = [one.kurtosis for one in spreads.values()]
    return {
        "kurtosis": statistics.fmean(kurtosis),
        "largest kurtosis": max(kurtosis),
        "channel ratio": statistics.fmean(one.channel_ratio for one in spreads.values()),
    }
