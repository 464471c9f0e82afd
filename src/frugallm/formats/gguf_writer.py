"""Write a model as a GGUF file for llama.cpp, tensor by tensor.

A tensor is stored, in this order of preference: as the bytes of the source where that is a GGUF file and has it in the
same type; with the codes of the source where that is a compressed folder and the type holds them; encoded anew
(:mod:`~frugallm.formats.gguf_types`). What comes out is decoded and compared, so that the summary can say which tensors kept
every value.

Norms, biases, positions and the routers of mixtures are F32. Embedding and head are Q8_0 where the type asked for has fewer
bits, whether they are tied or not (llama.cpp's own tool takes Q6_K for the head where rows allow it, and the type asked for,
for an embedding of its own): a table is read row by row and loses most at few bits. Where a row is no multiple of a type's
block the type that llama.cpp falls back to takes its place, F16 at last; that is said before anything is written. The experts
of a block lie in one tensor per projection, ``(experts, out, in)``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from frugallm.errors import ExportError
from frugallm.formats import gguf_types, shards
from frugallm.formats.gguf_families import ONE_EXPERT, GGUFFamily, gguf_family, stored_tensors
from frugallm.formats.gguf_transcode import transcode
from frugallm.formats.gguf_vocabulary import name_to_llama_cpp, vocabulary
from frugallm.formats.packed_folder import PackedFolder
from frugallm.models.gguf_architectures import ARCHITECTURES
from frugallm.models.gguf_file import GGUFFile
from frugallm.models.gguf_reader import GGUFData
from frugallm.progress import Progress

if TYPE_CHECKING:
    from frugallm.models.checkpoint import Checkpoint

TABLES = "Q8_0"
#: Matrices that llama.cpp keeps as they are: routers and learned positions.
UNQUANTIZED = ("ffn_gate_inp", "position_embd")
#: What ``general.file_type`` calls a file whose linears are of a type.
FILE_TYPES = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S", "Q3_K": "MOSTLY_Q3_K_S"}
FILE_TYPES["MXFP4"] = "MOSTLY_MXFP4_MOE"
_ENTRIES_COMPARED = 2**20


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes
    ----------
    name
        Its name there.
    sources
        Names of the tensors that make it: one, or one per expert, which are stacked.
    shape
        Row-major, ``(out, in)`` or ``(experts, out, in)``.
    kind
        Its type.
    values
        What is in it where nothing of the model is: ``(width,)``, stored as F32.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    values: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """What will be in the file.

    Attributes
    ----------
    family
        How llama.cpp describes the model.
    entries
        Its tensors in order.
    metadata
        Keys and values of the file's head.
    notes
        What to say before the work begins.
    """

    family: GGUFFamily
    entries: tuple[Entry, ...]
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass
class Summary:
    """What became of the tensors: how many kept every value, how many were rounded, and bytes and entries of all."""

    lossless: int = 0
    rounded: int = 0
    stored_bytes: int = 0
    entries: int = 0
    types: Counter[str] = field(default_factory=Counter)

    def add(self, entry: Entry, stored_bytes: int, *, exact: bool) -> None:
        """Count one tensor more."""
        self.lossless += exact
        self.rounded += not exact
        self.stored_bytes += stored_bytes
        self.entries += math.prod(entry.shape)
        self.types[entry.kind] += 1

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.types.most_common())
        bits = 8 * self.stored_bytes / self.entries
        return (
            f"{self.lossless} tensors lossless, {self.rounded} rounded; {kinds}; "
            f"{self.stored_bytes / 1e6:.1f} MB, {bits:.2f} bits per weight"
        )


def make_layout(checkpoint: Checkpoint, kind: str, tables: str | None = None) -> Layout:
    """Decide everything about a file before it is written.

    Parameters
    ----------
    kind
        Type of the linears, one of :data:`~frugallm.formats.gguf_types.TYPES`.
    tables
        Type of embedding and head; ``None``: :data:`TABLES`, or ``kind`` where that has as many bits.

    Raises
    ------
    ExportError
        If the model, or its tokenizer, cannot be said in GGUF.
    """
    family = gguf_family(checkpoint)
    wanted_of_tables = tables or (kind if kind in gguf_types.PLAIN else TABLES)
    found_tables = {f"{path}.weight" for path in (checkpoint.family.embedding, checkpoint.family.head)}
    divisors = family.positions(checkpoint.config).divisors
    entries = [Entry(name, (), tuple(values.shape), "F32", values) for name, values in divisors.items()]
    wanted = {}
    for name, sources in stored_tensors(checkpoint, family).items():
        shape = checkpoint.shape(sources[0])
        if len(shape) == 1 or name.split(".")[-2] in UNQUANTIZED:
            fitting = "F32"
        else:
            wanted[name] = wanted_of_tables if sources[0] in found_tables else kind
            fitting = gguf_types.fitting_type(wanted[name], shape[-1])
        stacked = (len(sources), *shape) if ONE_EXPERT.search(sources[0]) else shape
        entries.append(Entry(name, sources, stacked, fitting))
    notes = family.notes(checkpoint.config) + _fallback_notes(entries, wanted)
    if wanted_of_tables != kind:
        notes.insert(0, f"embedding and head are stored as {wanted_of_tables}")
    tokenizer, more = vocabulary(checkpoint)
    metadata = _metadata(checkpoint, family, kind) | tokenizer
    metadata["general.name"] = name_to_llama_cpp(checkpoint, metadata)
    return Layout(family, tuple(entries), metadata, (*notes, *more))


def _fallback_notes(entries: list[Entry], wanted: Mapping[str, str]) -> list[str]:
    """Name every type that rows do not fit, with what takes its place and where."""
    places: dict[tuple[str, str, int], list[str]] = {}
    for entry in entries:
        kind = wanted.get(entry.name, entry.kind)
        if entry.kind != kind:
            places.setdefault((kind, entry.kind, entry.shape[-1]), []).append(entry.sources[0])
    notes = []
    for (kind, instead, width), names in places.items():
        block, _ = gguf_types.block_size(kind)
        parts = dict.fromkeys(name.split(".")[-2] for name in names)
        notes.append(
            f"{kind} needs rows of a multiple of {block}: {len(names)} tensors with rows of {width} "
            f"({', '.join(parts)}) are stored as {instead}"
        )
    return notes


def _metadata(checkpoint: Checkpoint, family: GGUFFamily, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {"general.type": "model"}
    known = checkpoint.metadata
    found["general.name"] = known.get("name") or Path(checkpoint.name).name
    if "license" in known:
        found["general.license"] = known["license"].strip('"')
    found["general.file_type"] = int(LlamaFileType[FILE_TYPES.get(kind, f"MOSTLY_{kind}")])
    found["general.quantization_version"] = GGML_QUANT_VERSION
    return found | family.metadata(checkpoint.config)


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    layout: Layout,
    importance: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write the file; ``path`` is incomplete until this returns.

    Parameters
    ----------
    checkpoint
        Where weights come from; one tensor at a time is in memory.
    layout
        What :func:`make_layout` decided.
    importance
        Name of a weight to the importance ``(in,)`` of its input channels.

    Raises
    ------
    ExportError
        If a value is too large for the type; ``ModelError`` if the source is damaged.
    """
    progress, importance, summary = progress or Progress(), importance or {}, Summary()
    writer = GGUFWriter(path, layout.family.name)
    for key, value in layout.metadata.items():
        _add_value(writer, key, value)
    for entry in layout.entries:
        shape = _byte_shape(entry.shape, entry.kind)
        writer.add_tensor_info(
            entry.name,
            shape,
            np.dtype(np.uint8),
            math.prod(shape),
            raw_dtype=GGMLQuantizationType[entry.kind],
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for index, entry in enumerate(layout.entries, 1):
            rows, exact = _entry_rows(checkpoint, layout.family, entry, importance)
            writer.write_tensor_data(rows)
            summary.add(entry, rows.nbytes, exact=exact)
            progress.event("tensor", index=index, of=len(layout.entries))
    finally:
        writer.close()
    shards.sync(path)
    return summary


def _entry_rows(
    checkpoint: Checkpoint, family: GGUFFamily, entry: Entry, importance: Mapping[str, Tensor]
) -> tuple[np.ndarray, bool]:
    """Return the bytes of a tensor of the file, and whether every value was kept."""
    if entry.values is not None:
        return gguf_types.encode(entry.values[None], entry.kind).reshape(-1), True
    stacked = np.empty(
        (len(entry.sources), *_byte_shape(checkpoint.shape(entry.sources[0]), entry.kind)), np.uint8
    )
    exact = True
    for place, name in zip(stacked, entry.sources):
        value = checkpoint.tensor(name).float()
        if value.ndim == 1 and name.endswith(".weight"):  # the gain of a norm
            value = value + checkpoint.family.gain_offset
        _check_size(value, entry.kind, f"{checkpoint.where(name)}: {name}")
        rows, kept = stored_rows(checkpoint, name, value, entry.kind, importance.get(name))
        order = family.row_order(name, len(value), checkpoint.config)
        if order is not None:
            rows = rows[order] if value.ndim > 1 else rows.reshape(len(value), -1)[order]
        place[...] = rows.reshape(place.shape)
        exact = exact and kept
    return stacked.reshape(_byte_shape(entry.shape, entry.kind)), exact


def _byte_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    entries, size = gguf_types.block_size(kind)
    return (*shape[:-1], shape[-1] // entries * size)


def stored_rows(
    checkpoint: Checkpoint, name: str, value: Tensor, kind: str, importance: Tensor | None = None
) -> tuple[np.ndarray, bool]:
    """Return a tensor in a type, rows in the order of ``transformers``, and whether every value was kept.

    Parameters
    ----------
    value
        The tensor as it is read, ``(rows, width)`` or ``(width,)`` float32.

    Returns
    -------
    tuple
        ``(rows, bytes)`` uint8, and whether decoding gives ``value`` again.
    """
    matrix = value if value.ndim > 1 else value[None]
    if value.ndim > 1 and isinstance(checkpoint, GGUFFile):
        stored_type, raw = checkpoint.stored(name)
        if stored_type == kind:
            return raw, True
    if kind == "F32":
        return gguf_types.encode(matrix, kind), True
    q = checkpoint.quantized(name.removesuffix(".weight")) if isinstance(checkpoint, PackedFolder) else None
    kept = None if q is None else transcode(q, kind)
    if kept is not None:
        error = _error(matrix, kept, kind)
        if error == 0:
            return kept, True
    encoded = gguf_types.encode(matrix, kind, importance)
    if kept is not None and error < _error(matrix, encoded, kind):
        return kept, False
    return encoded, _error(matrix, encoded, kind, stop_at_first=True) == 0


def _error(value: Tensor, stored: np.ndarray, kind: str, *, stop_at_first: bool = False) -> float:
    """Return the squared error of stored rows, or of the first rows that have one."""
    step = max(1, _ENTRIES_COMPARED // value.shape[1])
    total = 0.0
    for start in range(0, len(value), step):
        rows = slice(start, start + step)
        total += float((gguf_types.decode(stored[rows], kind) - value[rows]).double().square().sum())
        if total and stop_at_first:
            break
    return total


def _check_size(value: Tensor, kind: str, what: str) -> None:
    if kind in ("F32", "BF16") or not value.numel():
        return
    largest = float(value.abs().max())
    if largest > gguf_types.LARGEST_HALF:
        raise ExportError(
            f"{what} holds {largest:.3g}, more than the float16 numbers of {kind} reach",
            "Write gguf:BF16 or gguf:F32",
        )


def _add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def read_back(path: Path, layout: Layout) -> None:
    """Read the head of a finished file with our own reader: names, shapes and types are what they should be.

    Raises
    ------
    ExportError
        If they are not; ``ModelError`` if the file is damaged.
    """
    found = {name: (info.shape, info.kind.name) for name, info in GGUFData(path).tensors.items()}
    if found != {entry.name: (entry.shape, entry.kind) for entry in layout.entries}:
        raise ExportError(f"{path} was not written as it should have been", "Write it again")
    read_here = layout.family.name in ARCHITECTURES
    if read_here and not any(entry.name.startswith("rope_factors") for entry in layout.entries):
        GGUFFile(path).validate()
