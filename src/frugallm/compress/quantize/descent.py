"""Coordinate descent: better codes for a weight that is rounded already, its grid left as it is. Tensors in, tensors out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from frugallm.compress.quantize.solvers import Rounding
from frugallm.formats.quantized_tensor import QuantizedTensor
from frugallm.threads import threads


def descend(
    weight: Tensor, second_moment: Tensor, start: QuantizedTensor, *, passes: int, block_size: int = 128
) -> QuantizedTensor:
    """Give columns, one after the other, the nearest values given all the others (QuIP, arXiv 2307.13304, section 3).

    Coordinate descent on ``tr((Q - W) H (Q - W)^T)``: no step makes it larger.

    Parameters
    ----------
    weight, second_moment
        As in :func:`~frugallm.compress.quantize.solvers.compensate`.
    start
        Codes to begin with; its scales and zero points stay.
    passes
        How often all columns are gone through.
    block_size
        Columns whose gradients are computed in one product; changes speed, not results.
    """
    if not passes:
        return start
    width, h = weight.shape[1], second_moment
    columns = start.scheme.columns_per_scale(width)
    s, z = (
        start.scale.float().T.contiguous(),
        None if start.zero is None else start.zero.float().T.contiguous(),
    )
    values = start.on_grid().T.contiguous()  # (in, out)
    rounding = Rounding(values, s, z, (torch.arange(width) // columns).tolist(), start.scheme)
    rounding.codes.copy_(start.codes.T)
    error = values - weight.T
    with threads(1):
        for begin in [*range(0, width, block_size)] * passes:
            block = slice(begin, min(begin + block_size, width))
            gradient = h[block] @ error
            for i, j in enumerate(range(block.start, block.stop)):
                if h[j, j] <= 0:
                    continue
                found = rounding(values[j] - gradient[i] / h[j, j], j)
                change = found - values[j]
                gradient.addr_(h[block, j], change)
                error[j] += change
                values[j] = found
    return replace(start, codes=rounding.codes.T.contiguous())
