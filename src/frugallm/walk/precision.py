"""In which type products are computed, and how float32 sums of bfloat16 products are had at bfloat16 speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def _float32_sums_of_bfloat16_products() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def exact_products(dtype: torch.dtype):  # noqa: ANN201  (a context manager of one of two kinds)
    """Return a context in which a float32 product of values that came as ``dtype`` is exact and as fast as can be.

    Values that came as bfloat16 are multiplied by the bfloat16 units with float32 sums; anything else in plain float32.
    """
    if dtype is torch.bfloat16 and hasattr(torch.backends.mkldnn, "matmul"):
        return _float32_sums_of_bfloat16_products()
    return nullcontext()
