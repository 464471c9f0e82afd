"""Rotary positions of a GGUF file as ``transformers`` describes them: the reverse of :mod:`frugallm.formats.gguf_rotary`.

A file of Llama 3.1 and its successors holds a divisor per frequency (``rope_freqs.weight``) and not the numbers that they were
made from. Where the published numbers make the same divisors they are taken, else the divisors themselves, which
``transformers`` takes under the name of longrope.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: The numbers of Llama 3.1, 3.2 and 3.3, which differ in the factor alone.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def plain(theta: float) -> dict[str, Any]:
    """Return the parameters of positions as they are."""
    return {"rope_type": "default", "rope_theta": theta}


def linear(theta: float, factor: float) -> dict[str, Any]:
    """Return the parameters of positions divided by ``factor``."""
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def yarn(theta: float, factor: float, original: int, attention: float) -> dict[str, Any]:
    """Return the parameters of YaRN; llama.cpp multiplies ``attention`` with the factor of the paper."""
    found = {"rope_type": "yarn", "rope_theta": theta, "factor": factor}
    found["original_max_position_embeddings"] = original
    if attention != 1:
        found["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
    return found


def divided(theta: float, divisors: Tensor, context: int) -> dict[str, Any]:
    """Return parameters that make frequencies divided by ``divisors`` ``(head / 2,)``, without a longest context."""
    factor = float(divisors.max())
    published = {"rope_type": "llama3", "rope_theta": theta, "factor": factor} | LLAMA3
    if torch.allclose(_llama3(theta, factor, len(divisors)), divisors.double(), rtol=1e-5, atol=0):
        return published
    factors = [float(divisor) for divisor in divisors]
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _llama3(theta: float, factor: float, count: int) -> Tensor:
    """Return the divisors of Llama 3.1 with this factor: 1 for short waves, ``factor`` for long ones, smooth between."""
    frequency = theta ** -(torch.arange(count, dtype=torch.float64) / count)
    turns = LLAMA3["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
