"""Which product precision a processor is fast at, and how a forward pass uses it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

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
    known = ("auto", "bf16", "fp32")
    if precision not in known:
        raise ParameterError(f"dtype of an evaluation must be one of {', '.join(known)}; got '{precision}'")
    adjustable = hasattr(torch.backends.mkldnn, "matmul")
    if precision == "bf16" and not adjustable:
        raise ParameterError("bf16 products need torch 2.9 or later", "Use dtype fp32, or a newer torch")
    if precision == "auto":
        return fast_dtype() if adjustable else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 matrices run on the processor's bf16 units, with float32 sums and results.

    Nothing is stored in bf16: activations, norms, the residual stream and softmax stay float32, and so does
    what quantizes activations. Autocast stores every product's result in bf16 instead, which on a 135M model
    alone makes a divergence of 3e-4 nats/token; this makes less than 1e-8 on AVX512-BF16, at nearly the same
    speed.
    """
    if dtype == torch.float32:
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
