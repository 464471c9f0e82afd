"""Folders packed by the published rules of each layout, bit by bit, for tests of what reads and writes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from frugallm.cli.main import main
from frugallm.errors import FrugalError
from frugallm.models import open_checkpoint


def refusal(capsys: Any, *arguments: str) -> str:
    """Run a command that must end with status 2 and one line; return the line."""
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("load ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def word_rows(codes: list[list[int]], bits: int) -> Tensor:
    """Write rows of codes as bit streams, cut into int32 words."""
    rows = []
    for row in codes:
        stream = "".join(f"{code:0{bits}b}"[::-1] for code in row)
        stream += "0" * (-len(stream) % 32)
        words = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def gptq_parts(codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, *, version: str) -> dict[str, Tensor]:
    """Pack ``codes`` ``(out, in)``, ``zeros`` and ``scales`` ``(out, groups)`` as GPTQ does."""
    stored = zeros - 1 if version == "gptq" else zeros
    return {
        "qweight": word_rows(codes.tolist(), bits).T.contiguous(),
        "qzeros": word_rows(stored.T.tolist(), bits),
        "scales": scales.T.half().contiguous(),
    }


def awq_parts(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Pack ``codes`` ``(out, in)``, ``zeros`` and ``scales`` ``(out, groups)`` as AWQ's gemm version does."""

    def words(columns: list[list[int]]) -> Tensor:
        mixed = [
            [row[8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8]] for i in range(len(row))] for row in columns
        ]
        return word_rows(mixed, 4)

    return {
        "qweight": words(codes.T.tolist()),
        "qzeros": words(zeros.T.tolist()),
        "scales": scales.T.half().contiguous(),
    }


def gemv_parts(codes: Tensor, zeros: Tensor, scales: Tensor, words: int) -> dict[str, Tensor]:
    """Pack them as AWQ's gemv version does, with room for ``8 words`` groups."""
    room = [[0] * (8 * words - zeros.shape[1])] * len(zeros)
    return {
        "qweight": word_rows(codes.tolist(), 4),
        "qzeros": word_rows([row + more for row, more in zip(zeros.tolist(), room)], 4),
        "scales": torch.cat([scales, torch.tensor(room)], 1).half(),
    }


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def edit_settings(folder: Path, **changes: Any) -> None:
    """Change entries of ``quantization_config``."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.setdefault("quantization_config", {}).update(changes)
    path.write_text(json.dumps(config))


def packed_copy(
    source: Path, target: Path, quantization: dict[str, Any], pack: Callable[[str, Tensor], dict[str, Tensor]]
) -> Path:
    """Copy a folder with the linears of its blocks packed: ``pack(path, weight)`` returns tensors by the ends of names."""
    shutil.copytree(source, target)
    edit_settings(target, **quantization)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            path = name.removesuffix(".weight")
            parts = pack(path, tensors.pop(name))
            tensors.update({f"{path}.{leaf}": part for leaf, part in parts.items()})

    rewrite(target, change)
    return target


def scatter(folder: Path, files: list[str]) -> None:
    """Spread the tensors of a folder over files of these names, one after the other, with an index."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    places = {name: files[i % len(files)] for i, name in enumerate(sorted(tensors))}
    for file in files:
        part = {name: tensors[name] for name, place in places.items() if place == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    path.unlink()
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damage(intact: bytes, changes: list[tuple[float, int]]) -> bytes:
    """Change bytes of a safetensors file: half of the places lie in the header."""
    header = 8 + int.from_bytes(intact[:8], "little")
    content = bytearray(intact)
    for place, value in changes:
        content[int(place * 2 % 1 * (header if place < 0.5 else len(content)))] = value
    return bytes(content)


def read_or_refused(folder: Path) -> None:
    """Read everything; what fails must fail with one line that names the folder."""
    failed = None
    try:
        checkpoint = open_checkpoint(folder, compressed=True)
        for name in checkpoint.names():
            checkpoint.tensor(name)
    except FrugalError as error:
        failed = error
    line = str(failed)
    assert failed is None or (failed.status == 2 and str(folder) in line and "\n" not in line), line


def damaged(test: Callable[..., None]) -> Callable[..., None]:
    """Call ``test(folder, changes)`` with many ways to damage a file."""
    places = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))
    drawn = given(changes=st.lists(places, min_size=1, max_size=8))(test)
    quiet = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=quiet)(drawn)


def read_damaged(folder: Path, changes: list[tuple[float, int]]) -> None:
    """Read a folder whose weights are damaged; they are as they were afterwards."""
    path = folder / "model.safetensors"
    intact = path.read_bytes()
    try:
        path.write_bytes(damage(intact, changes))
        read_or_refused(folder)
    finally:
        path.write_bytes(intact)
