"""Which product precision a processor is fast at, and how a forward pass uses it."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from frugallm.errors import ParameterError

Precision = Literal["auto", "bf16", "fp32"]


@cache
def processor_flags() -> frozenset[str]:
    """Return the processor's feature flags as Linux names them; empty where they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def fast_dtype() -> torch.dtype:
    """Return ``torch.bfloat16`` where the processor multiplies it natively, else ``torch.float32``.

    Native means AVX512-BF16 or AMX on x86, the BF16 extension on ARM. Anywhere else bf16 products are
    emulated and slower than float32.
    """
    flags = processor_flags()
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.bfloat16 if "bf16" in flags else torch.float32
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16"} & flags else torch.float32


def product_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype for ``"auto"`` (what the processor is fast at), ``"bf16"`` or ``"fp32"``."""
    known = {"auto": fast_dtype(), "bf16": torch.bfloat16, "fp32": torch.float32}
    if precision not in known:
        raise ParameterError(f"dtype of an evaluation must be one of {', '.join(known)}; got '{precision}'")
    return known[precision]


def products_in(dtype: torch.dtype, device: torch.device | str = "cpu") -> AbstractContextManager:
    """Return a context in which matrix products run in ``dtype`` and all else stays float32.

    The model itself is float32, so norms, the residual stream and softmax are too; only the inputs of a
    product are rounded. Weights are not kept in both types.
    """
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype, cache_enabled=False)
