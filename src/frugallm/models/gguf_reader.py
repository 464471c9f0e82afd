"""The binary layout of a GGUF file: metadata and where each tensor lies.

The ``gguf`` package reads files too, but makes an array of every token string, which takes seconds for an
ordinary vocabulary. Here every length is checked against the file before it is used, so a damaged file can
neither crash the reader nor make it allocate much.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from frugallm.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
MAX_DIMENSIONS = 4
LARGEST = 2**31  # no width or count of a real model is larger; beyond it sizes overflow


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in the file.

    Attributes
    ----------
    shape
        In row-major order, ``(out, in)``: GGUF stores dimensions the other way round.
    offset, row_bytes
        First byte in the file, and bytes of one row (the last dimension).
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    row_bytes: int

    @property
    def row_count(self) -> int:
        """Number of rows: all dimensions but the last, multiplied."""
        return math.prod(self.shape[:-1])


class GGUFData:
    """Metadata and tensors of one mapped GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                if stream.read(4) != MAGIC:
                    raise ModelError(
                        f"{path} is not a GGUF file", "Give a .gguf file or a Hugging Face folder"
                    )
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror})") from error
        cursor = _Cursor(self._map, path)
        cursor.skip(4)
        version = cursor.number("<I")
        if version not in VERSIONS:
            raise ModelError(f"{path} is GGUF version {version}", "Versions 2 and 3 (little-endian) are read")
        tensor_count, value_count = cursor.number("<Q"), cursor.number("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = cursor.string()
            if key in self.metadata:
                raise cursor.damaged(f"key '{key}' appears twice")
            self.metadata[key] = cursor.value(cursor.number("<I"))
        self.tensors = self._tensors(cursor, tensor_count)

    def _tensors(self, cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise cursor.damaged(f"alignment is {alignment}, no power of two")
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = cursor.string()
            if name in entries:
                raise cursor.damaged(f"tensor '{name}' appears twice")
            dimensions = cursor.number("<I")
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise cursor.damaged(f"tensor '{name}' has {dimensions} dimensions")
            shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
            entries[name] = (shape, cursor.number("<I"), cursor.number("<Q"))
        start = -(-cursor.at // alignment) * alignment
        return {
            name: self._info(name, shape, kind, start + offset, cursor.damaged)
            for name, (shape, kind, offset) in entries.items()
        }

    def _info(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, damaged: Callable[[str], ModelError]
    ) -> TensorInfo:
        known = {member.value: member for member in GGML_QUANT_SIZES}
        if kind not in known:
            raise damaged(f"tensor '{name}' has the unknown type {kind}")
        block, block_bytes = GGML_QUANT_SIZES[known[kind]]
        if min(shape) < 1 or shape[-1] % block:
            raise damaged(f"tensor '{name}' of type {known[kind].name} has shape {shape}")
        info = TensorInfo(shape, known[kind], offset, shape[-1] // block * block_bytes)
        if offset + info.row_count * info.row_bytes > len(self._map):
            raise damaged(f"tensor '{name}' reaches past the end of the file")
        return info

    def value(self, key: str, default: float | str | None) -> tuple[str, Any]:
        """Return the full key of a hyper-parameter, with the architecture in front, and its value."""
        full = f"{self.metadata.get('general.architecture')}.{key}"
        return full, self.metadata.get(full, default)

    def count(self, key: str, default: int | None = None) -> int:
        """Return a hyper-parameter that counts something.

        Raises
        ------
        ModelError
            If it is no positive whole number.
        """
        full, value = self.value(key, default)
        if type(value) is not int or not 1 <= value < LARGEST:
            raise ModelError(
                f"{self.path}: {full} is {value!r}, expected a positive whole number", "Fetch it again"
            )
        return value

    def real(self, key: str, default: float) -> float:
        """Return a hyper-parameter that measures something.

        Raises
        ------
        ModelError
            If it is no positive finite number.
        """
        full, value = self.value(key, default)
        with np.errstate(over="ignore", under="ignore"):
            number = (
                float(str(np.float32(value))) if type(value) is float else 0.0
            )  # 1e-5, not 9.999999747e-06
        if not 0 < number < float("inf"):
            raise ModelError(
                f"{self.path}: {full} is {value!r}, expected a positive number", "Fetch it again"
            )
        return number

    def raw(self, name: str) -> np.ndarray:
        """Return the stored bytes of a tensor, ``(rows, row_bytes)``, as a view of the mapped file."""
        info = self.tensors[name]
        count = info.row_count * info.row_bytes
        return np.frombuffer(self._map, np.uint8, count, info.offset).reshape(info.row_count, info.row_bytes)


class _Cursor:
    """Reads forward through the mapped file; every length is checked first."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self.at = 0

    def damaged(self, what: str) -> ModelError:
        return ModelError(f"{self._path} is damaged: {what}", "Fetch it again")

    def skip(self, count: int) -> int:
        """Move on by ``count`` bytes and return where they begin."""
        start, self.at = self.at, self.at + count
        if self.at > len(self._data):
            raise self.damaged(f"it ends within its header (byte {len(self._data)})")
        return start

    def number(self, form: str) -> int:
        return struct.unpack_from(form, self._data, self.skip(struct.calcsize(form)))[0]

    def string(self) -> str:
        start = self.skip(self.number("<Q"))
        try:
            return self._data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"text at byte {start} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            if kind == STRING:
                return self._strings(count)
            return self._scalars(kind, count).tolist()
        return self._scalars(kind, 1).item()

    def _scalars(self, kind: int, count: int) -> np.ndarray:
        if kind not in SCALARS:
            raise self.damaged(f"value of unknown type {kind} at byte {self.at}")
        form = np.dtype(SCALARS[kind])
        return np.frombuffer(self._data, form, count, self.skip(count * form.itemsize))

    def _strings(self, count: int) -> list[str]:
        # A vocabulary has 100,000 strings: this loop does what string() does, with less overhead.
        data, at, end, length = self._data, self.at, len(self._data), struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length(data, at)[0]
                if at > end:
                    break
                found.append(data[start:at].decode("utf-8"))
        except (struct.error, UnicodeDecodeError) as error:
            raise self.damaged(f"text at byte {at} cannot be read") from error
        if at > end:
            raise self.damaged(f"it ends within its header (byte {end})")
        self.at = at
        return found
