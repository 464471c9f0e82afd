"""Facts about one stored linear, for the report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frugallm.compress.plan import Work
from frugallm.compress.prune.unstructured.masks import choose_zeros
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.solvers import proxy_loss
from frugallm.evaluate.precision import products_in
from frugallm.formats.quantized_tensor import QuantizedTensor
from frugallm.walk.statistics import Statistics


def linear_facts(
    original: Tensor,
    value: Tensor,
    form: QuantizedTensor | Tensor,
    work: Work,
    statistics: Statistics,
    fast: torch.dtype,
) -> dict[str, Any]:
    """Return how far ``value`` ``(out, in)``, which ``form`` stands for, is from ``original``."""
    facts: dict[str, Any] = {
        "scheme": work.label(),
        "step": " ".join(step.name() for step in (*work.steps, *work.repairs)),
        "weight_error": weight_error(original, value),
    }
    if work.pruned is not None:
        facts |= {"weights": value.numel(), "zeros": int((value == 0).sum())}
    if "second_moment" in statistics:
        h = statistics["second_moment"]
        with products_in(fast):  # to three digits
            size = max(proxy_loss(original, torch.zeros_like(original), h), 1e-30)
            facts["error"] = proxy_loss(original, value, h) / size
            facts["baseline_error"] = proxy_loss(original, _naive(original, form, work), h) / size
    return facts


def weight_error(original: Tensor, value: Tensor) -> float:
    """Return ``|value - original| / |original|``."""
    return float((value - original).norm() / original.norm().clamp(min=1e-12))


def _naive(weight: Tensor, form: QuantizedTensor | Tensor, work: Work) -> Tensor:
    """Return what the same zeros and the same grid make of ``weight`` by magnitude and rounding alone."""
    if work.pruned is not None:
        weight = weight.masked_fill(choose_zeros(weight.abs(), work.pruned.zeros, "layer"), 0.0)
    return weight if isinstance(form, Tensor) else round_to_nearest(weight, form.scheme).dequantize()
