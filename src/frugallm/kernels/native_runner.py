"""A runner whose step is one native call."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor

from frugallm.errors import JobError, ParameterError
from frugallm.kernels import library
from frugallm.kernels.decoder import Decoder, DecoderLayer
from frugallm.kernels.memory import in_large_pages
from frugallm.kernels.operations import EPILOGUES
from frugallm.kernels.packing import TILE

BLOCK = 16
NORMS = ("norm", "second_norm", "output_norm", "down_norm", "query_norm", "key_norm")
#: What a step can find wrong with what it is given, by what the native code returns.
FAULTS = {
    2: "starts do not divide the tokens",
    3: "a token is not in the vocabulary",
    4: "a position is beyond the context, or does not follow the one before",
    5: "a block of a table does not exist",
    6: "a wanted row does not exist",
}


class NativeRunner:
    """A decoder with a paged cache in bf16; see ``Runner`` of the engine for what a step takes.

    A token's result depends on its own sequence alone, bit for bit: neither on other rows of the step, nor on chunks, nor on
    the number of threads.

    Parameters
    ----------
    decoder
        Packed weights (:func:`~frugallm.kernels.decoder.read_decoder`).
    blocks
        Blocks of the cache, of ``block_size`` tokens each.
    threads
        Threads of a step; ``None``: as many as torch uses, but not more than there are processors for this process.
    path
        Native path; ``None``: the one in use.

    Raises
    ------
    ParameterError
        If there are no native kernels here.
    """

    block_size = BLOCK

    def __init__(
        self, decoder: Decoder, blocks: int, threads: int | None = None, path: str | None = None
    ) -> None:
        path = path or library.path_name()
        native = library.library()
        if native is None or path == "reference":
            raise ParameterError(
                "a native runner needs native kernels", "Unset FRUGAL_KERNELS, or install a compiler"
            )
        self.decoder, self.blocks, self.path, self._native = decoder, blocks, path, native
        heads = decoder.heads
        padded = -(-heads.width // 16) * 16
        shape = (len(decoder.layers), blocks, heads.values * padded * BLOCK)
        self._keys, self._values = (
            in_large_pages(torch.zeros(shape, dtype=torch.bfloat16)) for _ in range(2)
        )
        self._floats = [x.float().contiguous() for x in (decoder.last_norm, decoder.cos, decoder.sin)]
        self._layers = (library.Layer * len(decoder.layers))(
            *(_layer_struct(layer, *self._floats[1:]) for layer in decoder.layers)
        )
        self._model = self._model_struct()
        self._pool = library.pool(threads or _threads())
        self._stepper = native.frugal_stepper_new(
            library.operations(path), self._pool.address, ctypes.byref(self._model)
        )

    def __del__(self) -> None:
        if getattr(self, "_stepper", None):
            self._native.frugal_stepper_free(self._stepper)
            self._stepper = None

    @property
    def threads(self) -> int:
        """Threads of a step."""
        return self._pool.threads

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self._keys.nbytes + self._values.nbytes

    def step(
        self, tokens: Tensor, positions: Tensor, starts: Tensor, tables: Tensor, logits_rows: Tensor
    ) -> Tensor:
        """Compute one step and return the logits of ``logits_rows``, float32 ``(rows, vocabulary)``.

        Raises
        ------
        ParameterError
            If tokens, positions or tables do not fit the model or each other; nothing is changed then.
        """
        given = [x.to(torch.int32).contiguous() for x in (tokens, positions, starts, tables, logits_rows)]
        head = self.decoder.head
        logits = torch.empty(len(logits_rows), head.tiles * TILE)
        batch = library.Batch(
            *(x.data_ptr() for x in given),
            count=len(tokens),
            sequences=len(starts) - 1,
            table_width=tables.shape[1],
            rows=len(logits_rows),
            logits=logits.data_ptr(),
        )
        fault = self._native.frugal_step(self._stepper, ctypes.byref(batch))
        if fault == 1:
            raise JobError(f"no memory for a step of {len(tokens)} tokens", "Take smaller steps")
        if fault:
            raise ParameterError(f"a step cannot be computed: {FAULTS[fault]}")
        return logits[:, : head.rows]

    def copy_block(self, source: int, target: int) -> None:
        """Copy keys and values of a block to another, all layers."""
        for cache in (self._keys, self._values):
            cache[:, target] = cache[:, source]

    def _model_struct(self) -> library.Model:
        decoder, heads = self.decoder, self.decoder.heads
        return library.Model(
            layers=self._layers,
            embedding=decoder.embedding.struct,
            head=decoder.head.struct,
            last_norm=self._floats[0].data_ptr(),
            keys=self._keys.data_ptr(),
            values=self._values.data_ptr(),
            count=len(decoder.layers),
            hidden=decoder.hidden,
            heads=heads.query,
            key_heads=heads.values,
            head_dim=heads.width,
            inner=decoder.inner,
            vocabulary=decoder.head.rows,
            positions=decoder.cos.shape[-2],
            blocks=self.blocks,
            activation=EPILOGUES.index(decoder.activation),
            eps=decoder.eps,
            scale=heads.width**-0.5 if decoder.scale is None else decoder.scale,
            embed_scale=decoder.embed_scale,
        )


def _layer_struct(layer: DecoderLayer, cos: Tensor, sin: Tensor) -> library.Layer:
    norms = {name: getattr(layer, name) for name in NORMS}
    return library.Layer(
        **{name: getattr(layer, name).struct for name in ("qkv", "output", "gate_up", "down")},
        **{name: None if norm is None else norm.data_ptr() for name, norm in norms.items()},
        cos=cos[layer.rotation].data_ptr(),
        sin=sin[layer.rotation].data_ptr(),
        window=layer.window,
    )


def _threads() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), available))
