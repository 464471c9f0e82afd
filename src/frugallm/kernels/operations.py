"""The kernels as functions of tensors, by the path in use or one that is named: for tests, the bench, and single uses."""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import Tensor

from frugallm.kernels import library, reference
from frugallm.kernels.packing import TILE, PackedLinear

#: Of a row of inputs that lie beside each other.
WORDS = 16
EPILOGUES = ("store", "add", "silu_mul", "gelu_mul")
Gated = Literal["silu_mul", "gelu_mul"]


def linear(
    x: Tensor,
    w: PackedLinear,
    path: str | None = None,
    threads: int = 1,
    epilogue: Literal["store", "silu_mul", "gelu_mul"] = "store",
) -> Tensor:
    """Return ``x`` times a packed weight.

    Parameters
    ----------
    x
        float32 ``(rows, width)``.
    w
        The weight ``(out, width)``; gate and up, for what multiplies them, in turns of 16 rows.
    path
        A native path or ``reference``; ``None``: the one in use.
    threads
        Threads of native code; the result does not depend on them.
    epilogue
        What becomes of the product: nothing more, or ``silu(gate) * up`` or ``gelu(gate) * up`` ``(rows, out / 2)``.
    """
    path = path or library.path_name()
    if path == "reference":
        out = reference.linear(x, w)
        if epilogue == "store":
            return out
        gate, up = out.view(len(x), -1, 2, TILE).unbind(2)
        return reference.GATED[epilogue](gate, up).reshape(len(x), -1)
    rows, padded = len(x), w.groups * w.group
    filled = x.float().contiguous()
    if padded > x.shape[1]:  # torch's threads, busy for a while after a copy, would be in the way
        filled = torch.nn.functional.pad(filled, (0, padded - x.shape[1]))
    words = torch.empty(rows, -(-padded // WORDS) * WORDS, dtype=torch.int32)
    scales, sums = torch.empty(rows, w.groups), torch.empty(rows, w.groups, dtype=torch.int32)
    columns = w.tiles * TILE // (1 if epilogue == "store" else 2)
    out = torch.empty(rows, columns)
    _native().frugal_linear(
        library.operations(path),
        library.pool(threads).address,
        ctypes.byref(w.struct),
        *(filled.data_ptr(), padded, rows, words.data_ptr(), scales.data_ptr(), sums.data_ptr()),
        *(out.data_ptr(), columns, EPILOGUES.index(epilogue)),
    )
    return out[:, : w.rows] if epilogue == "store" else out


def embed(rows: Tensor, w: PackedLinear, path: str | None = None) -> Tensor:
    """Return rows of a packed table, float32 ``(len(rows), width)``."""
    path = path or library.path_name()
    if path == "reference":
        return reference.embed(rows, w)
    index, out = rows.to(torch.int32).contiguous(), torch.empty(len(rows), w.width)
    ops = library.operations(path)
    _native().frugal_embed(ops, ctypes.byref(w.struct), index.data_ptr(), len(rows), out.data_ptr(), w.width)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, path: str | None = None) -> Tensor:
    """Return ``x (rows, width)`` over the root of its mean square, times ``weight (width,)``."""
    path = path or library.path_name()
    if path == "reference":
        return reference.rms_norm(x, weight, eps)
    x, weight, out = x.contiguous(), weight.contiguous(), torch.empty(x.shape)
    pointers = x.data_ptr(), weight.data_ptr(), eps, len(x), x.shape[1], out.data_ptr()
    _native().frugal_rms_norm(library.operations(path), *pointers)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, path: str | None = None) -> Tensor:
    """Return ``x (rows, head)`` rotated by ``cos`` and ``sin`` ``(rows, head / 2)``."""
    path = path or library.path_name()
    if path == "reference":
        return reference.rotate(x, cos, sin)
    out, cos, sin = x.clone(memory_format=torch.contiguous_format), cos.contiguous(), sin.contiguous()
    pointers = out.data_ptr(), cos.data_ptr(), sin.data_ptr()
    _native().frugal_rotate(library.operations(path), *pointers, len(x), x.shape[1] // 2)
    return out


def gated_mul(gate: Tensor, up: Tensor, how: Gated = "silu_mul", path: str | None = None) -> Tensor:
    """Return ``silu(gate) * up`` or ``gelu(gate) * up``, of GELU the form with a hyperbolic tangent."""
    path = path or library.path_name()
    if path == "reference":
        return reference.GATED[how](gate, up)
    gate, up, out = gate.contiguous(), up.contiguous(), torch.empty(gate.shape)
    pointers = gate.data_ptr(), up.data_ptr(), gate.numel(), EPILOGUES.index(how), out.data_ptr()
    _native().frugal_gated_mul(library.operations(path), *pointers)
    return out


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    path: str | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Return the attention of queries ``(count, head)`` over one sequence's keys and values ``(length, head)``.

    Parameters
    ----------
    positions
        Where each query stands, ascending; it sees positions up to its own, or the last ``window`` of them.
    table
        Blocks of the cache that are written and read, int32; ``None``: in order.
    """
    path = path or library.path_name()
    if path == "reference":
        return reference.attend(queries, keys, values, positions, scale, window)
    head, length = keys.shape[1], len(keys)
    padded, blocks = -(-head // 16) * 16, -(-length // reference.BLOCK)
    table = torch.arange(blocks, dtype=torch.int32) if table is None else table
    store = torch.zeros(2, int(table.max()) + 1, padded * reference.BLOCK, dtype=torch.bfloat16)
    cache = library.Cache(
        store[0].data_ptr(), store[1].data_ptr(), padded * reference.BLOCK, head, padded, window, scale
    )
    native, ops = _native(), library.operations(path)
    keys, values, queries = (x.float().contiguous() for x in (keys, values, queries))
    where = ctypes.byref(cache), table.data_ptr()
    native.frugal_write_cache(ops, *where, 0, length, keys.data_ptr(), values.data_ptr())
    pairs = torch.empty(len(queries), padded, dtype=torch.bfloat16)
    native.frugal_to_bf16(ops, queries.data_ptr(), len(queries), head, padded, pairs.data_ptr())
    out, positions = torch.empty(len(queries), head), positions.to(torch.int32).contiguous()
    native.frugal_attend(ops, *where, pairs.data_ptr(), positions.data_ptr(), len(queries), out.data_ptr())
    return out


def _native() -> ctypes.CDLL:
    native = library.library()
    assert native is not None
    return native
