"""Hidden states of all calibration windows, in memory or, past a limit, in a file that the system pages in and out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

TOKENS_PER_BATCH = 2048
#: Bytes of hidden states that stay in memory unless told otherwise. A file costs little more: the system caches it.
HIDDEN_LIMIT = 2**27


class HiddenStates:
    """``(windows, length, width)`` values, visited batch by batch.

    Parameters
    ----------
    shape
        ``(windows, length, width)``.
    dtype
        Type of the values.
    spill
        File that holds the values when they are larger than ``limit``; mapped, so they are not the process's own memory.
    limit
        Bytes that may stay in memory.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, spill: Path, limit: int) -> None:
        windows, length, width = shape
        count = windows * length * width
        self.shape = shape
        self.bytes = count * dtype.itemsize
        self.spilled = self.bytes > limit
        if self.spilled:
            spill.unlink(missing_ok=True)
            _reserve(spill, self.bytes)
            self.values = torch.from_file(str(spill), shared=True, size=count, dtype=dtype).view(shape)
            self._file: Path | None = spill
        else:
            self.values = torch.empty(shape, dtype=dtype)
            self._file = None
        self.step = max(1, TOKENS_PER_BATCH // length)

    @property
    def held_bytes(self) -> int:
        """Bytes of this process's own memory that the values take."""
        return 0 if self.spilled else self.bytes

    def batches(self) -> Iterator[slice]:
        """Yield slices of windows that hold about 2,048 tokens each."""
        for start in range(0, self.values.shape[0], self.step):
            yield slice(start, min(start + self.step, self.values.shape[0]))

    def __getitem__(self, batch: slice) -> Tensor:
        return self.values[batch]

    def __setitem__(self, batch: slice, value: Tensor) -> None:
        self.values[batch] = value

    def close(self) -> None:
        """Let the values go, the file included."""
        del self.values
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """Take the space now: a disk that is full later would end the process by a signal, not by an error."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # not everywhere
            os.posix_fallocate(file.fileno(), 0, size)
