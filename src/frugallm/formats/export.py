"""Write a result of ``frugal run`` in another format. What loads which format is in ``engines.yaml``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugallm.errors import ExportError, OutputError, nearest
from frugallm.models.safetensors_folder import read_config
from frugallm.progress import Progress

if TYPE_CHECKING:
    from frugallm.formats.decoded import Decoded

DRAFT = ".exporting"
NOT_ROUNDED = (
    "the dense format has no place for rounded activations: inputs of linears are no longer rounded, "
    "so the copy does not compute what the compressed folder does"
)


def _write_dense(source: Decoded, folder: Path, _: Progress) -> None:
    import torch

    from frugallm.formats.folder import write_dense
    from frugallm.models.open import open_checkpoint

    write_dense(source, folder, getattr(torch, source.dtype))
    open_checkpoint(folder)  # names, shapes and types are what the configuration asks for


def _write_bitsandbytes(source: Decoded, folder: Path, _: Progress) -> None:
    from frugallm.formats.bitsandbytes import write

    write(source, folder)


@dataclass(frozen=True)
class Format:
    """A format to write.

    Attributes
    ----------
    summary
        What it is, and what for.
    write
        ``write(source, folder, progress)`` makes the folder; ``None``: a result of ``frugal run`` is in this format.
    rounds_inputs
        Whether the format can say that inputs of linears are rounded at run time.
    """

    summary: str
    write: Callable[[Decoded, Path, Progress], None] | None
    rounds_inputs: bool


FORMATS = {
    "compressed-tensors": Format("what 'frugal run' writes", None, rounds_inputs=True),
    "dense": Format(
        "a plain Hugging Face folder with the stored values written out, for programs that read nothing else",
        _write_dense,
        rounds_inputs=False,
    ),
    "bitsandbytes": Format(
        "the 8-bit format of transformers with bitsandbytes, for results of llm_int8",
        _write_bitsandbytes,
        rounds_inputs=True,
    ),
}


def export(
    folder: str | Path, to: str, out: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """Write the model in a folder that ``frugal run`` wrote in another format.

    The weights are read, decoded and written part by part. The new folder appears under its name when it is complete.

    Parameters
    ----------
    folder
        A finished result.
    to
        Name of a format, a key of :data:`FORMATS`. ``dense`` keeps the values that the codes stand for, rounded to the
        type in which the folder stores what is not compressed (bf16 unless the run said otherwise).
    out
        Where to write; ``folder`` with ``-FORMAT`` behind it if not given.
    progress
        Told what the new format cannot keep.

    Returns
    -------
    Path
        The new folder.

    Raises
    ------
    ExportError
        If there is no such format, the folder is in it already, or the folder is no result of ``frugal run``.
    OutputError
        If something is in the way.

    Examples
    --------
    >>> from frugallm.formats.export import export
    >>> export("runs/demo", "dense")  # doctest: +SKIP
    """
    if to not in FORMATS:
        raise ExportError(f"there is no format '{to}'", nearest(to, FORMATS))
    chosen, folder = FORMATS[to], Path(folder)
    manifest = _manifest(folder)
    if chosen.write is None:
        raise ExportError(f"{folder} is in the format {to} already", "Use it as it is; nothing was written")
    target = folder.resolve().with_name(f"{folder.resolve().name}-{to}") if out is None else Path(out)
    if target.exists():
        raise OutputError(f"{target} exists", "Choose another --out")

    from frugallm.formats import shards
    from frugallm.formats.decoded import Decoded, Own

    own = read_config(folder).get("quantization_config", {}).get("quant_method") == Own.method
    source = (Own if own else Decoded)(folder)
    source.validate()
    if to == "dense" and not source.quantizes:
        raise ExportError(f"{folder} is dense already: nothing in it is quantized", "Use it as it is")
    notes = [NOT_ROUNDED] if source.rounds_inputs and not chosen.rounds_inputs else []
    for note in notes:
        (progress or Progress()).event("warn", text=note)
    draft = target.with_name(target.name + DRAFT)
    if draft.exists():  # left by an export that was killed
        shutil.rmtree(draft)
    try:
        chosen.write(source, draft, progress or Progress())
        shards.write_bytes(draft / "README.md", _card(source, target, to, manifest, notes).encode())
        draft.rename(target)
    finally:
        if draft.exists():
            shutil.rmtree(draft)
    shards.sync(target.parent)
    return target


def _manifest(folder: Path) -> dict[str, Any]:
    """Return what the run that wrote ``folder`` recorded about it."""
    path = folder / "manifest.json"
    if path.is_file():
        try:
            return json.loads(path.read_text(encoding="utf-8"))["job"]
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{path} cannot be read ({error})", "Make the folder again") from None
    if not folder.exists() and folder.with_name(f"{folder.name}.partial").exists():
        raise ExportError(f"{folder} is not finished", "Finish it: the command that began it, with --resume")
    raise ExportError(f"{folder} is no result of 'frugal run'", "Give a folder with manifest.json in it")


def _card(source: Decoded, target: Path, to: str, manifest: dict[str, Any], notes: list[str]) -> str:
    front = {
        "license": source.metadata.get("license", "other").strip('"'),
        "base_model": manifest["model"]["name"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["frugallm", *manifest["methods"]],
    }
    steps = "\n".join(f"    {json.dumps(step)}" for step in manifest["recipe"])
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [
        f"# {target.name}",
        "",
        f"{manifest['model']['name']}, compressed by FrugalLM with",
        "",
        steps,
        "",
    ]
    lines += [f"and written out again in the format `{to}` ({source.dtype}): {FORMATS[to].summary}.", ""]
    lines += [f"Note: {note}." for note in notes]
    return "\n".join(lines) + "\n"
