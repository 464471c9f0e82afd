"""A compression job: what it is made of, where its unfinished work lies, and how it goes on after a break.

The work of a job for ``OUT`` lies in ``OUT.partial`` beside it: ``job.json`` says what the job is, then one durable shard
per part of the model. ``OUT`` itself appears by renaming, complete or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import frugallm
from frugallm.choice import settle
from frugallm.compress.plan import Plan
from frugallm.errors import DataError, OutputError
from frugallm.evaluate.memory import give_back
from frugallm.formats import compressed_tensors, folder, shards
from frugallm.formats.quantized_tensor import LinearScheme, QuantizedTensor
from frugallm.formats.stored import Stored
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.linears import name_in_files, turned
from frugallm.progress import Progress
from frugallm.recipe import Recipe
from frugallm.walk.forward import ROWS_PER_CHUNK
from frugallm.walk.hidden import HIDDEN_LIMIT
from frugallm.walk.solved import SolvedBlock
from frugallm.walk.walk import Walk

PARTIAL = ".partial"
STATE, MANIFEST, CHOICE = "job.json", "manifest.json", "schemes.json"


@dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of a result.

    Attributes
    ----------
    windows
        Calibration tokens ``(samples, length)``, or ``None`` when no step of the recipe reads text.
    text
        Name, digest and smoke label of the calibration text.
    stored, fast
        Type of uncompressed tensors, and type of products.
    original
        The model as it was given, where a step has prepared ``checkpoint`` from it.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    plan: Plan
    windows: Tensor | None
    text: dict[str, Any] | None
    seed: int
    stored: torch.dtype
    fast: torch.dtype
    threads: int
    hidden_limit: int = HIDDEN_LIMIT
    original: Checkpoint | None = None

    @property
    def given(self) -> Checkpoint:
        """The model as it was given: what the result is compared with."""
        return self.checkpoint if self.original is None else self.original

    @property
    def notes(self) -> tuple[str, ...]:
        """What the run should say beforehand."""
        if self.given.config.tie_word_embeddings == self.checkpoint.config.tie_word_embeddings:
            return self.plan.notes
        rows, width = self.checkpoint.shape(f"{self.checkpoint.family.head}.weight")
        more = f"{rows * width / 1e6:.1f} million more weights"
        return (*self.plan.notes, f"the head no longer is the embedding, and is stored beside it: {more}")

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a resumed run to equal an unbroken one, as plain JSON values."""
        tokens = None
        if self.windows is not None:
            digest = hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()
            tokens = {"samples": self.windows.shape[0], "seq_len": self.windows.shape[1], "digest": digest}
        return {
            "recipe": self.recipe.settings(),
            "methods": self.recipe.versions(),
            "model": {"name": self.given.name, "digest": self.given.digest()},
            "text": self.text,
            "tokens": tokens,
            "seed": self.seed,
            "dtype": str(self.stored).removeprefix("torch."),
            "products": str(self.fast).removeprefix("torch."),
            "threads": self.threads,
            "versions": {"frugallm": frugallm.__version__, "torch": torch.__version__},
        }


def needs_text(plan: Plan) -> bool:
    """Whether any step of the plan reads calibration text."""
    return _walk_reads_text(plan) or any(step.scheme_needs for step in plan.choosers)


def _walk_reads_text(plan: Plan) -> bool:
    """Whether any step reads it while blocks are worked on, and not only to choose beforehand."""
    names = {*plan.linears, *plan.pruned}
    works = [work for name in names if (work := plan.work(name)) is not None]
    if plan.reconstructions or any(s.rewrite_needs for s in plan.rewrites):
        return True
    return any(w.needs or w.input_needs for w in works)


class Identified(Protocol):
    """Work that can say what decides its bytes."""

    def identity(self) -> dict[str, Any]:
        """Return it as plain JSON values."""


class Workplace:
    """The folder of unfinished work of one job."""

    def __init__(self, out: Path) -> None:
        if not out.name:
            raise OutputError(f"'{out}' cannot be an output folder", "Give the name of a new folder")
        self.out = out
        self.path = out.with_name(out.name + PARTIAL)
        self.folder = self.path / "folder"
        self._begun: list[Path] | None = None  # folders that had to be made, if the work began here

    def prepare(self, job: Identified, *, resume: bool, overwrite: bool) -> bool:
        """Make ready to work on ``job``; return ``False`` when it is finished already.

        Raises
        ------
        OutputError
            If something is in the way, or what is there belongs to another job (it says what differs).
        """
        identity = job.identity()
        if overwrite:
            self._clear()
        if _exists(self.out) and not resume:
            raise OutputError(f"{self.out} exists", "Choose another --out, or --overwrite it")
        if _exists(self.path) and not resume:
            raise OutputError(
                f"{self.path} holds an unfinished run", "Go on with --resume, or start anew with --overwrite"
            )
        if _exists(self.out):
            if not (self.out / MANIFEST).is_file():
                raise OutputError(f"{self.out} is no result of a run", "Choose another --out")
            _same(_read_object(self.out / MANIFEST).get("job"), identity, self.out)
            self._discard()
            return False
        state = self.path / STATE
        if state.exists():
            _same(_read_object(state), identity, self.path)
            return True
        self._discard()  # without its job nothing in there counts: a removal was broken off
        self._begun = [parent for parent in self.path.parents if not parent.exists()]
        self.path.mkdir(parents=True)
        shards.write_bytes(state, json.dumps(identity, indent=1).encode())
        return True

    def abandon(self) -> None:
        """Leave nothing behind of work that began with this :meth:`prepare`; work resumed stays."""
        if self._begun is None:
            return
        self._discard()
        for parent in self._begun:
            with contextlib.suppress(OSError):  # somebody else put something there in the meantime
                parent.rmdir()
        self._begun = None

    def _clear(self) -> None:
        """Remove an earlier result, which is gone in one step, and unfinished work."""
        if _exists(self.out) and not _replaceable(self.out):
            raise OutputError(
                f"{self.out} is no result of a run and is not overwritten", "Choose another --out"
            )
        self._discard()
        if _exists(self.out):
            self.out.rename(self.path)
            self._discard()

    def _discard(self) -> None:
        if self.path.is_dir():
            (self.path / STATE).unlink(missing_ok=True)  # first: a removal may be broken off
        _remove(self.path)

    def shard(self, part: str) -> Path:
        """Return the file of one part of the model."""
        return self.path / f"{part}.safetensors"

    def facts(self, part: str) -> Path:
        """Return the file of what was measured on one part."""
        return self.path / f"{part}.json"

    def stored(self, job: Job) -> Stored:
        """Return the model as far as it is written."""
        return Stored(job.checkpoint, job.plan, self.shard)

    def finish(self) -> None:
        """Give the folder its name and remove the rest."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.folder.rename(self.out)
        shards.sync(self.out.parent)
        self._discard()


def _exists(path: Path) -> bool:
    return os.path.lexists(path)  # a link to nowhere is in the way too


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif _exists(path):
        path.unlink()


def _replaceable(out: Path) -> bool:
    """Whether ``out`` is the result of a run, or an empty folder: never somebody's other files."""
    return out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"{path} cannot be read as JSON ({error})", "Start anew with --overwrite") from None
    return content if isinstance(content, dict) else {}


def _same(before: Any, now: dict[str, Any], where: Path) -> None:
    different = list(_differences(before, now, ""))
    if different:
        raise OutputError(
            f"{where} belongs to another job: {'; '.join(different[:4])}",
            "Give the same command, or start anew with --overwrite",
        )


def _differences(before: Any, now: Any, path: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(k for k in now if k not in before)]
        return [
            d
            for k in keys
            for d in _differences(before.get(k), now.get(k), f"{path}.{k}" if path else str(k))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = zip(before, now)
        return [d for i, (b, n) in enumerate(pairs, 1) for d in _differences(b, n, f"{path} {i}")]
    return [] if before == now else [f"{path} was {_short(before)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 48 else text[:45] + "..."


# -- the work itself ---------------------------------------------------------------------------------------------------


def compress(job: Job, place: Workplace, progress: Progress) -> Job:
    """Write every part of the model that is not there yet, walking through what is.

    Returns
    -------
    Job
        The job as it was done: its plan says how each linear is stored, where steps chose that only now.

    Raises
    ------
    DataError
        If a step reads calibration text and there is none; nothing is written.
    """
    if job.windows is None and needs_text(job.plan):
        raise DataError(
            f"{' '.join(job.recipe.to_cli())} reads calibration text, and there is none", "Give a text"
        )
    job = replace(
        job,
        plan=settle(
            job.plan,
            job.checkpoint,
            job.windows,
            place.path / CHOICE,
            fast=job.fast,
            hidden_limit=job.hidden_limit,
            progress=progress,
        ),
    )
    walk = Walk(
        job.checkpoint,
        job.plan,
        job.windows if _walk_reads_text(job.plan) else None,
        place.path,
        fast=job.fast,
        stored=job.stored,
        hidden_limit=job.hidden_limit,
        seed=job.seed,
    )
    stored = place.stored(job)
    _write_table(job, place)
    todo = [i for i in range(len(walk)) if not place.shard(f"block-{i:05d}").exists()]
    if todo and walk.windows is not None:
        progress.event("stage", text="embedding")
        name = f"{job.checkpoint.family.embedding}.weight"
        walk.embed(lambda start, stop: stored.rows(name, start, stop))
    if todo:
        progress.event("stage", text="compressing")
    for index in range(len(walk)) if todo else ():
        part = f"block-{index:05d}"
        if index not in todo:
            if walk.hidden is not None:
                progress.event("stage", text=f"through block {index + 1} as stored")
                walk.replay(index, stored.block_state(index), stored.input_parameters)
            continue
        # Nothing of a block may outlive its turn: a name for it here would hold two blocks in memory.
        _write_block(job, place, part, walk.solve(index))
        give_back()
        progress.event("block", index=index + 1, of=len(walk))
    walk.close()
    _write_final(job, place)
    return job


def _table_tensors(job: Job, name: str) -> dict[str, Tensor]:
    """Return what is stored for the embedding or an untied head, compressed by rows if the plan says so."""
    checkpoint, weight = job.checkpoint, f"{name}.weight"
    table = job.plan.tables.get(name)
    if table is None:
        return {weight: checkpoint.tensor(weight).to(job.stored)}
    count, _ = checkpoint.shape(weight)
    pieces = [
        table.solver.solve(
            checkpoint.rows(weight, start, min(start + ROWS_PER_CHUNK, count)).float(), table.scheme
        )
        for start in range(0, count, ROWS_PER_CHUNK)
    ]
    q = QuantizedTensor(
        torch.cat([p.codes for p in pieces]), torch.cat([p.scale for p in pieces]), None, table.scheme
    )
    scheme = LinearScheme(weights=table.scheme)
    tensors = compressed_tensors.encode_linear(name, q, scheme, table=True)
    family = checkpoint.family
    if name == family.embedding and checkpoint.config.tie_word_embeddings and f"{name}.weight" in tensors:
        # Readers tie the weight of the head to the embedding; its scale has a name of its own.
        tensors[f"{family.head}.weight_scale"] = q.scale.clone()
    return tensors


def _write_table(job: Job, place: Workplace) -> None:
    path = place.shard("embedding")
    if not path.exists():
        shards.write_shard(path, _table_tensors(job, job.checkpoint.family.embedding))


def _write_block(job: Job, place: Workplace, part: str, done: SolvedBlock) -> None:
    tensors: dict[str, Tensor] = {}
    for name, tensor in done.block.state.items():
        path, _, leaf = name.rpartition(".")
        full = done.block.full_name(path)
        if leaf == "weight" and path in done.linears:
            scheme = job.plan.linears[full].scheme
            q, inputs = done.linears[path], done.inputs.get(path)
            tensors.update(compressed_tensors.encode_linear(full, q, scheme, inputs))
        else:
            stays = f"{full}.{leaf}"
            turn = turned(job.checkpoint.family, stays, tensor.shape)
            tensors[stays] = (tensor.T if turn else tensor).to(job.stored)
    facts = {"layers": done.layers, "seconds": done.seconds}
    shards.write_bytes(place.facts(part), json.dumps(facts).encode())
    shards.write_shard(place.shard(part), tensors)


def _write_final(job: Job, place: Workplace) -> None:
    path = place.shard("final")
    if path.exists():
        return
    head = job.checkpoint.family.head
    tensors: dict[str, Tensor] = {}
    for name in folder.final_names(job.checkpoint):
        if name == f"{head}.weight":
            tensors.update(_table_tensors(job, head))
        else:
            tensors[name] = job.checkpoint.tensor(name).to(job.stored)
    shards.write_shard(path, tensors)


def assemble(job: Job, place: Workplace) -> None:
    """Join the parts into the folder that will be handed out; companions and config included."""
    _remove(place.folder)
    place.folder.mkdir()
    parts = [place.shard(name) for name in folder.part_names(job.checkpoint)]
    own = compressed_tensors.quant_method(job.plan) == compressed_tensors.OWN
    stem = compressed_tensors.OWN if own else "model"
    shards.merge(parts, place.folder, partial(name_in_files, job.checkpoint.family), stem)
    tied = bool(job.checkpoint.config.tie_word_embeddings)
    quantization = compressed_tensors.quantization_config(job.plan, job.checkpoint.family, tied=tied)
    dtype = str(job.stored).removeprefix("torch.")
    shards.write_bytes(place.folder / "config.json", folder.config_json(job.checkpoint, dtype, quantization))
    folder.write_companions(job.checkpoint, place.folder)


def layer_facts(job: Job, place: Workplace) -> list[dict[str, Any]]:
    """Return what was measured on every linear, in order."""
    count = job.checkpoint.config.num_hidden_layers
    files = [place.facts(f"block-{i:05d}") for i in range(count)]
    return [layer for file in files for layer in json.loads(file.read_text())["layers"]]
