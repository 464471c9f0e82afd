"""safetensors files, written so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MAX_FILE_BYTES = 5_000_000_000
_COPY_BYTES = 1 << 24


def sync(path: Path) -> None:
    """Make a file, or a folder's list of names, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, make it durable, and give it its name."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(content)
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors under a temporary name, make the file durable, and give it its name."""
    draft = path.with_name(path.name + ".tmp")
    try:
        save_file({k: v.contiguous() for k, v in sorted(tensors.items())}, draft, metadata={"format": "pt"})
    except SafetensorError as error:
        # A full disk is told in words only; whoever reports it goes by the number.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(draft)) from error
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)


def read_shard(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a shard."""
    return load_file(path)


def _header(path: Path) -> tuple[dict[str, dict], int]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def merge(
    shards: Sequence[Path], folder: Path, rename: Callable[[str], str] = str, stem: str = "model"
) -> None:
    """Join shards, in order, into ``STEM.safetensors``, or into numbered files of at most 5 GB with an index.

    The bytes of the tensors are copied as they are, in pieces, so memory does not grow with the files.
    """
    parts: list[list[Path]] = [[]]
    size = 0
    for shard in shards:
        bytes_ = shard.stat().st_size
        if parts[-1] and size + bytes_ > MAX_FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(shard)
        size += bytes_
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        name = (
            f"{stem}.safetensors"
            if len(parts) == 1
            else f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        )
        names, data = _join(part, folder / name, rename)
        weight_map.update(dict.fromkeys(names, name))
        total += data
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_bytes(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2).encode())


def _join(shards: Sequence[Path], target: Path, rename: Callable[[str], str]) -> tuple[list[str], int]:
    header: dict[str, dict] = {}
    offset = 0
    for shard in shards:
        entries, _ = _header(shard)
        end = 0
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            header[rename(name)] = {**entry, "data_offsets": [offset + first, offset + last]}
            end = max(end, last)
        offset += end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for shard in shards:
            _, start = _header(shard)
            with shard.open("rb") as file:
                file.seek(start)
                while piece := file.read(_COPY_BYTES):
                    out.write(piece)
    sync(target)
    return list(header), offset
