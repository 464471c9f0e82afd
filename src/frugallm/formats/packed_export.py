"""Results written as GPTQ or AWQ folders: the same codes in another order, scales in float16.

Both layouts have one scheme for all linears and 16-bit scales of their own type. So what a result says is either kept
exactly, or the difference is named: scales in bf16 that float16 does not hold, and tables, which are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frugallm.errors import ExportError, JobError
from frugallm.formats import awq_layout, gptq_layout
from frugallm.formats.folder import write_model
from frugallm.formats.packed_folder import PackedFolder
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.progress import Progress

if TYPE_CHECKING:
    from frugallm.formats.decoded import Decoded

DENSE = "Write it with --to dense"


@dataclass(frozen=True)
class Target:
    """A layout to write.

    Attributes
    ----------
    name
        What to call it in messages.
    bits
        Widths that it holds.
    pack
        Returns the tensors of one linear by the ends of their names.
    settings
        ``settings(scheme, linears, skipped)`` returns ``quantization_config``: the scheme, paths inside a block of
        linears that are packed (``None``: all), and full paths of those that are not.
    reader
        Reads it back.
    """

    name: str
    bits: tuple[int, ...]
    pack: Callable[[QuantizedTensor], dict[str, Tensor]]
    settings: Callable[[WeightScheme, list[str] | None, list[str]], dict[str, Any]]
    reader: type[PackedFolder]


GPTQ = Target(
    "GPTQ",
    gptq_layout.BITS,
    gptq_layout.pack,
    lambda scheme, linears, _: gptq_layout.settings(scheme, linears),
    gptq_layout.GPTQFolder,
)
AWQ = Target(
    "AWQ",
    (awq_layout.BITS,),
    awq_layout.pack,
    lambda scheme, _, skipped: awq_layout.settings(scheme, skipped),
    awq_layout.AWQFolder,
)


def write_packed(source: Decoded, folder: Path, target: Target, progress: Progress) -> list[str]:
    """Write a result in another layout and read it back.

    Returns
    -------
    list of str
        What the layout cannot keep exactly.

    Raises
    ------
    ExportError
        If the layout cannot hold it; nothing is written.
    JobError
        If what is read back differs.
    """
    schemes = {path: source.scheme(path) for path in source.linears()}
    scheme = _one_scheme(source, schemes, target)
    skipped = [path for path, found in schemes.items() if found is None]
    packed = [path for path in schemes if path not in skipped]
    in_block = _in_block(source, packed, target) if target is GPTQ and skipped else None
    notes = _notes(source, packed, target)
    for note in notes:
        progress.event("warn", text=note)
    dtype = getattr(torch, source.dtype)

    def encode(name: str, value: Tensor) -> Mapping[str, Tensor]:
        path = name.removesuffix(".weight")
        if path == name or path not in packed:
            return {name: value.to(dtype)}
        return {f"{path}.{leaf}": part for leaf, part in target.pack(_halved(source, path)).items()}

    settings = target.settings(scheme, in_block, [*skipped, source.family.head])
    write_model(source, folder, dtype, encode, settings)
    _read_back(source, target.reader(folder), packed)
    return notes


def _one_scheme(source: Decoded, schemes: Mapping[str, Any], target: Target) -> WeightScheme:
    found: dict[WeightScheme, str] = {}
    for path, scheme in schemes.items():
        if scheme is None:
            continue
        weights = scheme.weights
        rows, width = source.shape(f"{path}.weight")
        if scheme.activations is not None:
            reason = "no place for rounded inputs"
        elif weights.zero_dtype != "int8":
            reason = "whole zero points only"
        elif weights.grid != "int":
            reason = "integers only"
        elif weights.extras:
            reason = "codes and nothing beside them"
        elif weights.bits not in target.bits:
            reason = f"only {', '.join(map(str, target.bits))} bits"
        elif rows * weights.bits % 32 or width * weights.bits % 32:
            reason = f"whole words of 32 bits only, and it has {rows} rows and {width} columns"
        else:
            found.setdefault(weights, path)
            continue
        raise ExportError(f"{source.path}: {target.name} has {reason}: {path} is {scheme.label()}", DENSE)
    if not found:
        raise ExportError(f"{source.path} has no quantized linear", DENSE)
    if len(found) > 1:
        (a, one), (b, two) = list(found.items())[:2]
        raise ExportError(
            f"{source.path}: {target.name} has one scheme for all linears, {one} is {a.label()} and {two} {b.label()}",
            DENSE,
        )
    return next(iter(found))


def _in_block(source: Decoded, packed: list[str], target: Target) -> list[str]:
    """Return which linears of a block are packed, the same in every block."""
    family = source.family
    by_block = [
        [name for name in family.linears(source.config, i) if f"{family.block(i)}.{name}" in packed]
        for i in range(source.config.num_hidden_layers)
    ]
    for index, linears in enumerate(by_block):
        if linears != by_block[0]:
            raise ExportError(
                f"{source.path}: {target.name} has the same linears in every block, block {index} differs from block 0",
                DENSE,
            )
    return by_block[0]


def _notes(source: Decoded, packed: list[str], target: Target) -> list[str]:
    """Say what is not kept exactly; scales beyond float16 are refused."""
    notes = []
    changed, total, worst = 0, 0, 0.0
    for path in packed:
        scale = source.part(path, "weight_scale")
        assert scale is not None
        half = scale.half()
        if not half.isfinite().all():
            raise ExportError(
                f"{source.path}: the scales of {path} reach {float(scale.abs().max()):.3g}, float16 ends at 65504",
                DENSE,
            )
        error = (
            ((half.double() - scale.double()) / scale.double()).abs().nan_to_num()
        )  # a scale of 0 stays one
        changed, total = changed + int((error > 0).sum()), total + scale.numel()
        worst = max(worst, float(error.max()))
    if changed:
        notes.append(
            f"{target.name} stores scales in float16: {changed} of {total} change, by {worst:.2g} of their value at most"
        )
    tables = [t for t in (source.family.embedding, source.family.head) if source.scheme(t) is not None]
    stored = [table for table in tables if f"{table}.weight" in source.names()]
    if stored:
        notes.append(
            f"{target.name} has no compressed tables: {' and '.join(stored)} written out in {source.dtype}"
        )
    return notes


def _halved(source: Decoded, path: str) -> QuantizedTensor:
    """Return the codes of a linear with scales in float16."""
    q = source.quantized(path)
    assert q is not None
    return replace(q, scale=q.scale.half(), scheme=q.scheme.model_copy(update={"scale_dtype": "float16"}))


def _read_back(source: Decoded, written: PackedFolder, packed: list[str]) -> None:
    written.validate()
    for path in packed:
        if not torch.equal(written.tensor(f"{path}.weight"), _halved(source, path).dequantize()):
            raise JobError(f"{written.path}: {path} is read back with other values", "Please report this")
