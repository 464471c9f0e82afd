"""What comes out of a training: the folder, held against the model that was trained, and its figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frugallm.errors import JobError
from frugallm.evaluate import Evaluation, evaluate_all
from frugallm.evaluate.machine import machine, versions
from frugallm.formats import shards
from frugallm.formats.folder import write_model
from frugallm.formats.verify import (
    ROUNDED_INPUT_TOLERANCE,
    WEIGHT_ONLY_TOLERANCE,
    ask_outside,
    compare,
    relative_error,
)
from frugallm.progress import Progress
from frugallm.text import leading_bos
from frugallm.training.layouts import Layout, dense
from frugallm.training.report import MEASUREMENTS, TrainReport
from frugallm.training.students import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from frugallm.compression import Clock
    from frugallm.job import Workplace
    from frugallm.training.run import TrainJob

MANIFEST, CARD = "manifest.json", "README.md"
CHECKED_TOKENS = (2, 48)  # prompts, tokens each


def write_folder(job: TrainJob, student: PreTrainedModel, folder: Path) -> Layout:
    """Write the trained model as its method stores it; the student then computes what the folder says."""
    layout = layout_of(job, student)
    as_stored(student, layout, job.stored)
    student.config.architectures = [type(student).__name__]
    if folder.exists():
        import shutil

        shutil.rmtree(folder)
    write_model(
        Trained(student, job.origin), folder, job.stored, layout.encode, layout.quantization, layout.stem
    )
    return layout


def layout_of(job: TrainJob, student: PreTrainedModel) -> Layout:
    """Return how the steps of a job store a student."""
    found = (step.hand_on(student, job.origin.family, job.stored) for step in job.steps)
    return next(filter(None, found), None) or dense(job.stored)


@torch.no_grad()
def as_stored(student: PreTrainedModel, layout: Layout, dtype: torch.dtype) -> None:
    """Give all tensors that are stored as they are the values that they have in ``dtype``."""
    latent = {f"{name}.weight" for name in layout.stored}
    for name, parameter in student.named_parameters():
        if name not in latent and not name.endswith(layout.dropped):
            parameter.copy_(parameter.to(dtype))


def checked_ids(job: TrainJob) -> Tensor:
    """Return the fixed prompts for verification, ``(prompts, tokens)``."""
    length = min(CHECKED_TOKENS[1], job.windows.shape[1])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, job.origin.config.vocab_size, (CHECKED_TOKENS[0], length), generator=generator)


def verified(job: TrainJob, student: PreTrainedModel, layout: Layout, folder: Path) -> str:
    """Load the folder and hold it against the model that was trained; return what to say about it.

    Raises
    ------
    JobError
        If they compute different things.
    """
    ids = checked_ids(job)
    tolerance = ROUNDED_INPUT_TOLERANCE if layout.rounds_inputs else WEIGHT_ONLY_TOLERANCE
    if layout.in_transformers:
        dtypes = {"float32": "float32", "default": None}
        seen = ask_outside(folder, ids.tolist(), dtypes=dtypes, threads=job.threads, eager=True)
        blocks = student.get_submodule(job.origin.family.blocks)
        error = compare(student, blocks, seen, ids, tolerance=tolerance, folder=folder)["float32_error"]
        who = "by plain transformers in a process of its own"
    else:
        error = relative_error(_logits(folder, ids), _logits(student, ids))
        who = "by frugallm.load, as plain transformers does not load this layout"
        if not error <= tolerance:
            raise JobError(
                f"{folder}: read back it computes something else (relative squared error {error:.1e}, "
                f"allowed {tolerance:.0e})",
                "The folder was not finished; please report this with the recipe",
            )
    return f"verified: loaded {who}, logits agree with the model that was trained (relative squared error {error:.1e})"


@torch.inference_mode()
def _logits(model: PreTrainedModel | Path, ids: Tensor) -> Tensor:
    from frugallm.models.open import load

    loaded = load(model)[0] if isinstance(model, Path) else model
    return loaded(ids).logits.float()


def measure(
    job: TrainJob, folder: Path | None, held_out: tuple[Tensor, Any], progress: Progress, clock: Clock
) -> Evaluation:
    """Return the figures on held-out text of the folder, or of what the training began with.

    Of a model that was given the divergence from it is measured as well.
    """
    windows, facts = held_out
    origin = job.origin
    from frugallm.models.open import load

    given = None if origin.scratch else origin.teacher()
    if folder is None:
        name, candidate = "before", given or origin.student(job.settings.seed)
    else:
        name, candidate = "after", load(folder)[0]
    bos = leading_bos(origin.tokenizer) is not None
    with clock.phase("evaluate"):
        found = evaluate_all({name: candidate}, given, windows, text=facts, bos=bos, progress=progress)
    return found[name]


def write_report(
    job: TrainJob,
    place: Workplace,
    layout: Layout,
    measured: tuple[Evaluation | None, Evaluation | None],
    curve: list[dict[str, float]],
    clock: Clock,
    notes: list[str],
) -> TrainReport:
    """Write manifest, measurements and model card; return the report."""
    from frugallm.report_files import file_digests

    folder = place.folder
    family = job.origin.family
    model = job.origin
    before, after = measured
    shapes = {name: q.codes.numel() for name, q in layout.stored.items()}
    sizes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    report = TrainReport(
        title=f"{model.name}: {' '.join(job.cli()) or 'plain training'}",
        model=model.name,
        from_scratch=model.scratch,
        recipe=job.cli(),
        identity=job.identity(),
        stored=layout.label,
        file_bytes=sizes,
        coded_weights=sum(shapes.values()),
        tokens=job.settings.max_steps * job.settings.batch * job.windows.shape[1],
        curve=curve,
        before=before,
        after=after,
        seconds={key: round(value, 3) for key, value in clock.seconds.items()},
        peak_bytes=clock.peak_bytes,
        machine=machine(),
        versions=versions(),
        notes=notes,
        how_to_load=how_to_load(place.out, layout),
    )
    assert family is not None
    manifest = {"job": job.identity(), "files": file_digests(folder)}
    shards.write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    shards.write_bytes(folder / MEASUREMENTS, (report.model_dump_json(indent=1) + "\n").encode())
    shards.write_bytes(folder / CARD, model_card(job, place.out, report).encode())
    return report


def how_to_load(out: Path, layout: Layout) -> str:
    """Return the lines of Python that load the result."""
    if not layout.in_transformers:
        return f'import frugallm\n\nmodel, tokenizer = frugallm.load("{out}")'
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{out}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{out}")'
    )


def model_card(job: TrainJob, out: Path, report: TrainReport) -> str:
    """Return the folder's ``README.md``."""
    origin = job.origin
    license_ = {} if origin.checkpoint is None else origin.checkpoint.metadata
    front: dict[str, Any] = {
        "license": license_.get("license", "other"),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["frugallm", *(step.name() for step in job.steps)],
    }
    if not origin.scratch:
        front["base_model"] = origin.name
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in front.items()), "---", "", f"# {out.name}", ""]
    steps = "\n".join(f"    {step}" for step in job.cli()) or "    (no step: plain training)"
    how = "trained from scratch" if origin.scratch else "trained further"
    lines += [f"{origin.name}, {how} by FrugalLM with", "", steps, ""]
    lines += [
        f"All settings are in `{MANIFEST}`, every figure in `{MEASUREMENTS}`.",
        "",
        report.to_markdown(),
    ]
    return "\n".join(lines)


def nats(evaluation: Evaluation) -> float:
    """Return the mean loss of an evaluation in nats/token."""
    return math.fsum(evaluation.nll_per_window) / len(evaluation.nll_per_window)
