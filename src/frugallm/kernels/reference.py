"""What the kernels compute, in plain torch: slow and obvious. Orders of sums are those of ``docs/kernels.md``.

Linears, norms, rotation and rows of tables are equal to native code bit for bit; what takes an exponential is as near as
float32 allows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, silu

from frugallm.kernels.packing import TILE, PackedLinear

BLOCK = 16


def round_inputs(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round activations to int8, each group's largest magnitude to 127.

    Parameters
    ----------
    x
        float32 ``(rows, width)``.
    group
        Inputs that share a scale.

    Returns
    -------
    tuple
        Codes float64 ``(rows, groups, group)``, scales float32 and sums of the codes float64 ``(rows, groups)``.
    """
    rows, width = x.shape
    grouped = pad(x, (0, -width % group)).view(rows, -1, group)
    top = grouped.abs().amax(-1)
    top = torch.where(top < 1e-30, 0.0, top)
    # A number over a tensor would be a product with the reciprocal, which is not always the nearest quotient.
    inverse = torch.where(top == 0, 0.0, torch.full_like(top, 127.0) / top)
    codes = (grouped * inverse[..., None]).round().double()
    return codes, top / 127.0, codes.sum(-1)


def linear(x: Tensor, w: PackedLinear) -> Tensor:
    """Return ``x (rows, width)`` times a packed weight, float32 ``(rows, out)``."""
    out = _codes(x, w) if w.scales is not None else _floats(x, w)
    return out if w.bias is None else out + w.bias[: w.rows]


def _codes(x: Tensor, w: PackedLinear) -> Tensor:
    inputs, input_scales, sums = round_inputs(x, w.group)
    values, scales, zeros = w.by_rows()
    assert scales is not None
    middle = 0 if w.has_minima else 8 if w.kind == "int4" else 128
    codes = pad(values.double() - middle, (0, -w.width % w.group)).view(w.rows, -1, w.group)
    total = torch.zeros(len(x), w.rows)
    for g in range(w.groups):
        products = inputs[:, g] @ codes[:, g].T  # whole numbers, exact in float64
        if zeros is not None and not w.has_minima:
            products = products - sums[:, g, None] * zeros[:, g].double()
        total = total + products.float() * (scales[:, g].float() * input_scales[:, g, None])
        if zeros is not None and w.has_minima:
            total = total + zeros[:, g].float() * (sums[:, g].float() * input_scales[:, g])[:, None]
    return total


def _floats(x: Tensor, w: PackedLinear) -> Tensor:
    values = pad(w.by_rows()[0].float(), (0, -w.width % w.group))
    x = pad(x.bfloat16().float() if w.kind == "bf16" else x, (0, -w.width % w.group))
    even, odd = torch.zeros(len(x), w.rows), torch.zeros(len(x), w.rows)
    for k in range(0, x.shape[1], w.group):
        if w.kind == "bf16":  # the second of a pair first, as the processor's instruction does
            even = even + x[:, k + 1, None] * values[:, k + 1]
            even = even + x[:, k, None] * values[:, k]
            odd = odd + x[:, k + 3, None] * values[:, k + 3]
            odd = odd + x[:, k + 2, None] * values[:, k + 2]
        else:
            even = even + x[:, k, None] * values[:, k]
            odd = odd + x[:, k + 1, None] * values[:, k + 1]
    return even + odd


def embed(rows: Tensor, w: PackedLinear) -> Tensor:
    """Return rows of a packed table, float32 ``(len(rows), width)``."""
    return w.dequantize()[rows.long()]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x (rows, width)`` over the root of its mean square, times ``weight (width,)``."""
    width = x.shape[1]
    squares = pad(x, (0, -width % TILE)).view(len(x), -1, TILE)
    lanes = torch.zeros(len(x), TILE)
    for i in range(squares.shape[1]):
        lanes = lanes + squares[:, i] * squares[:, i]
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
    # Torch's own root of float32 is not always the nearest; that of float64, rounded, is.
    root = torch.sqrt(((lanes.double() / width).float() + eps).double()).float()
    return x * (1.0 / root.double()).float() * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x (rows, head)`` rotated by ``cos`` and ``sin`` ``(rows, head / 2)``; halves are the pairs."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``."""
    return silu(gate) * up


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``gelu(gate) * up``, of GELU the form with a hyperbolic tangent."""
    return gelu(gate, approximate="tanh") * up


#: What becomes of gate and up.
GATED = {"silu_mul": silu_mul, "gelu_mul": gelu_mul}


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int = 0
) -> Tensor:
    """Return the attention of queries ``(count, head)`` over one sequence's keys and values ``(length, head)``.

    A query at position ``p`` sees positions 0 to ``p``, or the last ``window`` of them. Queries, keys and values are bf16.
    """
    scores = queries.bfloat16().float() @ keys.bfloat16().float().T * scale
    places = torch.arange(len(keys))
    hidden = places[None] > positions[:, None]
    if window:
        hidden |= places[None] <= positions[:, None] - window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values.bfloat16().float()
