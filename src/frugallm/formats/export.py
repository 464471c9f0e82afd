"""Write a model in another format. What loads which format is in ``engines.yaml``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugallm.errors import ExportError, OutputError, ParameterError, nearest
from frugallm.progress import Progress

if TYPE_CHECKING:
    from frugallm.formats.decoded import Decoded
    from frugallm.models.checkpoint import Checkpoint

DRAFT = ".exporting"


@dataclass(frozen=True)
class Calibration:
    """Text for an importance matrix: as in a run, ``samples`` windows of ``seq_len`` tokens, chosen by ``seed``."""

    text: str | Path | None = None
    samples: int = 128
    seq_len: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """What an export was asked for beside the format.

    Attributes
    ----------
    kind
        What stands behind the colon in the name of the format.
    tables
        Type of embedding and head, where the format has types.
    calibration
        Where importance comes from; ``None``: all channels count alike.
    progress
        Told what is going on.
    """

    kind: str = ""
    tables: str | None = None
    calibration: Calibration | None = None
    progress: Progress = field(default_factory=Progress)


def _write_dense(source: Decoded, folder: Path, _: Request) -> list[str]:
    import torch

    from frugallm.formats.folder import write_dense
    from frugallm.models.open import open_checkpoint

    write_dense(source, folder, getattr(torch, source.dtype))
    open_checkpoint(folder)  # names, shapes and types are what the configuration asks for
    return []


def _write_gptq(source: Decoded, folder: Path, request: Request) -> list[str]:
    from frugallm.formats.packed_export import GPTQ, write_packed

    return write_packed(source, folder, GPTQ, request.progress)


def _write_awq(source: Decoded, folder: Path, request: Request) -> list[str]:
    from frugallm.formats.packed_export import AWQ, write_packed

    return write_packed(source, folder, AWQ, request.progress)


def _write_bitsandbytes(source: Decoded, folder: Path, _: Request) -> list[str]:
    from frugallm.formats.bitsandbytes import write

    write(source, folder)
    return []


def _write_gguf(source: Checkpoint, file: Path, request: Request) -> list[str]:
    from frugallm.formats.gguf_writer import make_layout, read_back, write_gguf
    from frugallm.walk.importance import channel_importance

    progress = request.progress
    layout = make_layout(source, request.kind, request.tables)
    for note in layout.notes:
        progress.event("note", text=note)
    importance = {}
    if request.calibration is not None:
        windows = _windows(source, request.calibration)
        progress.event("stage", text="measuring the importance of input channels")
        importance = channel_importance(source, windows, progress)
    progress.event("stage", text="writing the file")
    summary = write_gguf(source, file, layout, importance, progress)
    read_back(file, layout)
    progress.event("note", text=str(summary))
    return []


def _windows(source: Checkpoint, wanted: Calibration) -> Any:
    from frugallm.text import calibration_windows, open_text

    text = open_text(wanted.text, "calibrate", source.tokenizer)
    return calibration_windows(text, source.tokenizer, wanted.samples, wanted.seq_len, wanted.seed)


def _gguf_types() -> tuple[str, ...]:
    from frugallm.formats.gguf_types import TYPES

    return TYPES


@dataclass(frozen=True)
class Format:
    """A format to write.

    Attributes
    ----------
    summary
        What it is, and what for.
    write
        ``write(source, path, request)`` makes the folder or file and returns what the format cannot keep; ``None``: a
        result of ``frugal run`` is in this format.
    rounds_inputs
        Whether the format can say that inputs of linears are rounded at run time, or ``write`` refuses such results.
    kinds
        Returns what may stand behind a colon, where something must.
    suffix
        End of the name of the file; empty: a folder. A file is written from any model, a folder from results only.
    """

    summary: str
    write: Callable[[Any, Path, Request], list[str]] | None
    rounds_inputs: bool
    kinds: Callable[[], tuple[str, ...]] = tuple
    suffix: str = ""


FORMATS = {
    "compressed-tensors": Format("what 'frugal run' writes", None, rounds_inputs=True),
    "dense": Format(
        "a plain Hugging Face folder with the stored values written out, for programs that read nothing else",
        _write_dense,
        rounds_inputs=False,
    ),
    "gptq": Format(
        "the layout of AutoGPTQ and GPTQModel, for engines that read it: weights of one scheme in 2, 3, 4 or 8 bits",
        _write_gptq,
        rounds_inputs=True,
    ),
    "awq": Format(
        "the layout of AutoAWQ (gemm), for engines that read it: weights of one scheme in 4 bits",
        _write_awq,
        rounds_inputs=True,
    ),
    "bitsandbytes": Format(
        "the 8-bit format of transformers with bitsandbytes, for results of llm_int8",
        _write_bitsandbytes,
        rounds_inputs=True,
    ),
    "gguf": Format(
        "one file for llama.cpp, weights in the type behind the colon",
        _write_gguf,
        rounds_inputs=False,
        kinds=_gguf_types,
        suffix=".gguf",
    ),
}


def export(
    model: str | Path,
    to: str,
    out: str | Path | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    tables: str | None = None,
    imatrix: bool = False,
    text: str | Path | None = None,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
) -> Path:
    """Write a model in another format.

    The weights are read, decoded and written part by part. The new folder or file appears under its name when it is
    complete.

    Parameters
    ----------
    model
        A finished result of ``frugal run``; for GGUF also any model: a folder, plain or compressed, a GGUF file or a name.
    to
        Name of a format, a key of :data:`FORMATS`. ``dense`` keeps the values that the codes stand for, rounded to the
        type in which the folder stores what is not compressed (bf16 unless the run said otherwise). ``gguf:TYPE`` is a
        GGUF file with linears in that type (:mod:`~frugallm.formats.gguf_types`).
    out
        Where to write; if not given the name of ``model`` with ``-FORMAT`` behind it, beside a folder or file, here for
        a model that is known by name.
    progress
        Told what the new format cannot keep, and what became of the tensors.
    overwrite
        Replace what is there.
    tables
        GGUF: type of embedding and head; Q8_0 if not given and the type asked for has fewer bits.
    imatrix, text, samples, seq_len, seed
        GGUF: weigh rounding errors by the mean square of each input channel over calibration windows of ``text``
        (``None``: the embedded one).

    Returns
    -------
    Path
        The new folder or file.

    Raises
    ------
    ExportError
        If there is no such format or type, the model cannot be said in it, the folder is in it already, or is no result
        of ``frugal run``.
    OutputError
        If something is in the way.

    Examples
    --------
    >>> from frugallm.formats.export import export
    >>> export("runs/demo", "dense")  # doctest: +SKIP
    >>> export("smollm2-135m", "gguf:Q4_0", "small.gguf")  # doctest: +SKIP
    """
    progress = progress or Progress()
    chosen, kind = find_format(to)
    name = to.partition(":")[0]
    manifest = None if chosen.suffix else _manifest(Path(model))
    if chosen.write is None:
        raise ExportError(f"{model} is in the format {to} already", "Use it as it is; nothing was written")
    calibration = _calibration(chosen, imatrix, text, samples, seq_len, seed)
    if tables is not None:
        if not chosen.suffix:
            raise ParameterError(f"the format {name} has no types of tables", "Leave --tables away")
        _, tables = find_format(f"{name}:{tables}")
    target = _target(model, name, kind, out, chosen.suffix)
    if target.exists() and (not overwrite or (chosen.suffix and target.is_dir())):
        raise OutputError(f"{target} exists", "Choose another --out, or --overwrite it")
    source = _source(model, results_only=not chosen.suffix)
    if not getattr(source, "exports", True):
        raise ExportError(f"{model} is in a layout that no other format holds", "Use it as it is")
    if target.exists() and Path(model).exists() and target.samefile(model):
        raise OutputError(f"{target} is the model itself", "Choose another --out")
    if not chosen.suffix and not getattr(source, "quantizes", True):
        raise ExportError(f"{model} is dense already: nothing in it is quantized", "Use it as it is")
    notes = (
        [not_rounded(name)] if getattr(source, "rounds_inputs", False) and not chosen.rounds_inputs else []
    )
    for note in notes:
        progress.event("warn", text=note)
    with _draft(target) as draft:
        notes += chosen.write(source, draft, Request(kind, tables, calibration, progress))
        if manifest is not None:
            from frugallm.formats import shards

            shards.write_bytes(draft / "README.md", _card(source, target, to, manifest, notes).encode())
    return target


def find_format(to: str) -> tuple[Format, str]:
    """Return the format that is written ``NAME`` or ``NAME:KIND``, and the kind.

    Raises
    ------
    ExportError
        If there is none; it names the nearest.
    """
    name, _, kind = to.partition(":")
    if name not in FORMATS:
        raise ExportError(f"there is no format '{name}'", nearest(name, FORMATS))
    kinds = FORMATS[name].kinds()
    if kinds and not kind:
        raise ExportError(
            f"{name} needs a type", f"For example {name}:{kinds[-5]}; known: {', '.join(kinds)}"
        )
    if kind and kind.upper() not in kinds:
        hint = nearest(kind.upper(), kinds) if kinds else f"Write --to {name}"
        raise ExportError(f"{name} has no type '{kind}'", hint)
    return FORMATS[name], kind.upper()


def not_rounded(name: str) -> str:
    """Return what to say where a format cannot keep rounded activations."""
    return (
        f"the {name} format has no place for rounded activations: inputs of linears are no longer rounded, "
        "so the copy does not compute what the compressed folder does"
    )


def _calibration(
    chosen: Format, imatrix: bool, text: str | Path | None, samples: int, seq_len: int, seed: int
) -> Calibration | None:
    for name, number, least in (("samples", samples, 1), ("seq_len", seq_len, 2), ("seed", seed, 0)):
        if not least <= number < 2**63:
            raise ParameterError(f"{name} must be {least} or more, in 63 bits; got {number}")
    if imatrix and not chosen.suffix:
        raise ParameterError("only GGUF files are written with an importance matrix", "Leave --imatrix away")
    if text is not None and not imatrix:
        raise ParameterError("a text is read for an importance matrix only", "Add --imatrix")
    return Calibration(text, samples, seq_len, seed) if imatrix else None


def _target(model: str | Path, name: str, kind: str, out: str | Path | None, suffix: str) -> Path:
    if out is not None:
        target = Path(out)
        if suffix and target.suffix != suffix:
            raise OutputError(
                f"'{out}' does not end in {suffix}", f"Call it {target.name or 'model'}{suffix}"
            )
        return target
    path = Path(model)
    place = path.resolve() if path.exists() else Path(path.name)
    stem = place.stem if place.suffix == suffix else place.name
    return place.with_name(f"{stem}-{kind or name}{suffix}")


def _source(model: str | Path, *, results_only: bool) -> Checkpoint:
    """Open a compressed folder with its stored codes, anything else as a model."""
    from frugallm.formats.decoded import Decoded
    from frugallm.formats.packed_folder import reader_of
    from frugallm.models.open import open_checkpoint

    folder = Path(model)
    unfinished = not folder.exists() and folder.with_name(f"{folder.name}.partial").exists()
    if unfinished or results_only or (folder / "manifest.json").is_file():
        _manifest(folder)
    if not results_only:
        return open_checkpoint(model, compressed=True)
    source = (reader_of(folder) or Decoded)(folder)  # Decoded says what the folder is not
    source.validate()
    return source


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """Give a name to write under; at the end it becomes ``target``, after an error nothing is left behind."""
    from frugallm.formats import shards

    draft = target.with_name(target.name + DRAFT)
    _remove(draft)  # left by an export that was killed
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        if target.is_dir():  # a file is replaced by the renaming itself
            shutil.rmtree(target)
        draft.replace(target)
    except BaseException:
        _remove(draft)
        for folder in made:
            folder.rmdir()
        raise
    shards.sync(target.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def _card(source: Any, target: Path, to: str, manifest: dict[str, Any], notes: list[str]) -> str:
    from frugallm.formats.engines import readers_of

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
    if readers := readers_of(to):
        lines += ["", "Read by frugallm.load, and by", "", *(f"- {reader}" for reader in readers)]
    return "\n".join(lines) + "\n"
