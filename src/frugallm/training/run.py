"""The training job: train a model with the steps of a recipe, prove what came out, hand it on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import frugallm
from frugallm.compression import DTYPES, Clock
from frugallm.errors import DataError, FrugalError, ParameterError, RecipeError, nearest
from frugallm.inference.contract import refuse_inference
from frugallm.progress import Progress
from frugallm.training.contract import TrainMethod
from frugallm.training.loop import Settings, begin, fit, method_arguments
from frugallm.training.students import Origin, open_origin

if TYPE_CHECKING:
    from frugallm.method import Method
    from frugallm.recipe import Recipe
    from frugallm.training.report import TrainReport

#: Checkpoints of an unfinished training lie below ``OUT.partial`` in this folder.
CHECKPOINTS = "checkpoints"
#: Checkpoints in a training, unless the user says how often.
SAVES = 10


@dataclass(frozen=True)
class TrainJob:
    """Everything that decides the bytes of a trained model.

    Attributes
    ----------
    windows
        Tokens to train on, ``(windows, length)``.
    text
        Name, digest and smoke label of their text.
    stored
        Type of tensors that are not quantized.
    """

    origin: Origin
    steps: tuple[TrainMethod, ...]
    windows: Tensor
    text: dict[str, Any]
    settings: Settings
    stored: torch.dtype
    threads: int

    def cli(self) -> list[str]:
        """Return the steps as on a command line."""
        from frugallm.recipe import Recipe

        return Recipe(steps=self.steps).to_cli() if self.steps else []

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a resumed training to equal an unbroken one, as plain JSON values."""
        from importlib import metadata

        digest = hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()
        settings = self.settings
        return {
            "command": "train",
            "recipe": [{step.name(): step.settings()} for step in self.steps],
            "methods": {step.name(): step.version() for step in self.steps},
            "model": self.origin.identity(),
            "text": self.text,
            "tokens": {
                "windows": self.windows.shape[0],
                "seq_len": self.windows.shape[1],
                "digest": digest,
            },
            "max_steps": settings.max_steps,
            "batch": settings.batch,
            "learning_rate": settings.learning_rate,
            "seed": settings.seed,
            "dtype": str(self.stored).removeprefix("torch."),
            "threads": self.threads,
            "versions": {
                "frugallm": frugallm.__version__,
                "torch": torch.__version__,
                "transformers": metadata.version("transformers"),
            },
        }


def train(
    model: Any,
    steps: Recipe | str | Path | Method | Iterable[Method | str] = (),
    *,
    out: str | Path,
    tokenizer: Any = None,
    from_scratch: bool = False,
    shape: dict[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    text: str | Path | None = None,
    seq_len: int = 256,
    max_steps: int = 300,
    batch: int = 8,
    learning_rate: float | None = None,
    seed: int = 0,
    save_every: int | None = None,
    eval_text: str | Path | None = None,
    windows: int = 8,
    evaluate: bool = True,
    verify: bool = True,
    dtype: str = "bf16",
    threads: int | None = None,
    progress: Progress | None = None,
) -> TrainReport:
    """Train a model with the steps' rounding, objective and settings, and write it to a new folder.

    Parameters
    ----------
    model
        A name, a folder, a GGUF file or a loaded ``transformers`` model (which needs ``tokenizer``); from scratch also
        ``"tiny"`` or ``"small"``.
    steps
        Training methods, as for :func:`frugallm.run`; none: plain training on next-token cross-entropy.
    out
        The folder to write. Unfinished work lies beside it, in ``out`` + ``.partial``.
    from_scratch, shape
        Begin with new weights in the model's configuration; with some of its values changed.
    resume, overwrite
        Go on from the last checkpoint; or remove what is there first.
    text, seq_len
        Text to train on (``None``: the embedded one), in windows of that many tokens.
    max_steps, batch
        Steps of the optimizer, and windows per step.
    learning_rate
        The highest; ``None``: the method's own.
    seed
        Of new weights, order of windows and every other random choice.
    save_every
        Steps between checkpoints (``None``: ten in all).
    eval_text, windows
        Held-out text (``None``: the embedded one, smoke figures) and how many windows.
    evaluate, verify
        Measure the loss before and after; load the result and compare it with the model that was trained.
    dtype
        Type of tensors that are stored as they are: ``bf16``, ``fp16`` or ``fp32``.
    threads
        Processor threads; ``None``: as many as torch uses.

    Returns
    -------
    TrainReport
        What was measured; also written to the folder.

    Raises
    ------
    FrugalError
        Bad input; nothing is left behind. ``JobError`` if the loss is not finite or the result does not verify.

    Examples
    --------
    >>> import frugallm
    >>> frugallm.train("tiny", ["bitnet"], from_scratch=True, out="runs/bitnet")  # doctest: +SKIP
    """
    from frugallm.job import Workplace
    from frugallm.training.report import MEASUREMENTS, TrainReport

    shown = progress or Progress()
    chosen = training_steps(steps)
    rate = _check_numbers(
        chosen, learning_rate, seq_len, max_steps, batch, seed, save_every, windows, threads
    )
    if dtype not in DTYPES:
        raise ParameterError(
            f"dtype must be one of {', '.join(DTYPES)}; got '{dtype}'", nearest(dtype, DTYPES)
        )
    scratch = check_steps(chosen, from_scratch)
    if threads is not None:
        torch.set_num_threads(threads)
    shown.event("stage", text="reading the model")
    origin = open_origin(
        model, tokenizer, None if text is None else str(text), scratch=scratch, changes=shape or {}
    )
    tokens, facts = _training_windows(origin, text, seq_len)
    place = Workplace(Path(out))
    settings = Settings(max_steps, batch, rate, seed, save_every or math.ceil(max_steps / SAVES))
    job = TrainJob(
        origin, chosen, tokens, facts, settings, getattr(torch, DTYPES[dtype]), torch.get_num_threads()
    )
    held_out = _held_out(origin, eval_text, windows, seq_len) if evaluate else None
    probe(chosen, origin)
    shown.event("start", model=origin.name, recipe=" ".join(job.cli()), out=str(place.out))
    if not place.prepare(job, resume=resume, overwrite=overwrite):
        shown.event("note", text=f"{place.out} is finished already")
        shown.event("done", out=str(place.out), seconds=0.0)
        return TrainReport.model_validate_json((place.out / MEASUREMENTS).read_text(encoding="utf-8"))
    try:
        return _carry_out(job, place, held_out, verify=verify, resumed=resume, progress=shown)
    except FrugalError as error:
        if error.status == FrugalError.status:
            place.abandon()
        raise


def training_steps(steps: Any) -> tuple[TrainMethod, ...]:
    """Return the training methods that ``steps`` names.

    Raises
    ------
    RecipeError
        If one of them does not act while a model is trained.
    """
    from frugallm.recipe import Recipe

    listed = steps if isinstance(steps, (str, Path)) or hasattr(steps, "steps") else _listed(steps)
    if not isinstance(listed, (str, Path)) and not hasattr(listed, "steps") and not listed:
        return ()
    found = Recipe.of(listed).steps
    for step in found:
        refuse_inference(step)
        if not isinstance(step, TrainMethod):
            raise RecipeError(
                f"'{step.name()}' does not act while a model is trained",
                "Apply it afterwards with frugal run",
            )
    return tuple(step for step in found if isinstance(step, TrainMethod))


def _listed(steps: Any) -> Any:
    from frugallm.method import Method

    return [steps] if isinstance(steps, Method) else list(steps)


def check_steps(steps: Sequence[TrainMethod], from_scratch: bool) -> bool:
    """Check that steps make sense together; return whether training begins with new weights.

    Raises
    ------
    RecipeError
        With the reason, and the mend.
    """
    names = [step.name() for step in steps]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{name} stands twice in the recipe", "Keep one")
    for verb, what in (
        ("hands_on", "decide how weights are stored"),
        ("has_loss", "have a loss of their own"),
        ("has_data", "choose what is trained on"),
    ):
        several = [step.name() for step in steps if getattr(step, verb)]
        if len(several) > 1:
            raise RecipeError(f"{several[0]} and {several[1]} both {what}", "Keep one")
    for step in steps:
        if step.begins == "scratch" and not from_scratch:
            raise RecipeError(
                f"{step.name()} trains new weights: a trained model's are lost to it", "Add --from-scratch"
            )
        if step.begins == "model" and from_scratch:
            raise RecipeError(
                f"{step.name()} trains a model that has learned already", "Leave out --from-scratch"
            )
    method_arguments(steps)
    return from_scratch


def probe(steps: Sequence[TrainMethod], origin: Origin) -> None:
    """Rewrite a model without weights, so that what does not fit is refused before any work begins."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        student = AutoModelForCausalLM.from_config(origin.config, dtype=torch.float32)
        for step in steps:
            step.rewrite(student, origin.family)


def _check_numbers(
    steps: Sequence[TrainMethod],
    learning_rate: float | None,
    seq_len: int,
    max_steps: int,
    batch: int,
    seed: int,
    save_every: int | None,
    windows: int,
    threads: int | None,
) -> float:
    """Check all numbers; return the learning rate to use."""
    numbers = {
        "seq_len": seq_len,
        "max_steps": max_steps,
        "batch": batch,
        "seed": seed,
        "save_every": save_every,
        "windows": windows,
        "threads": threads,
    }
    for name, number in numbers.items():
        least = {"seed": 0, "seq_len": 2}.get(name, 1)
        # numpy, which the Trainer seeds as well, takes 32 bits
        if number is not None and not least <= number < 2**32:
            raise ParameterError(f"{name} must be {least} or more, in 32 bits; got {number}")
    if learning_rate is None:
        return min((step.learning_rate for step in steps), default=TrainMethod.learning_rate)
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ParameterError(f"learning_rate must be more than 0; got {learning_rate}")
    return learning_rate


def _training_windows(origin: Origin, text: str | Path | None, seq_len: int) -> tuple[Tensor, dict[str, Any]]:
    from frugallm.text import evaluation_windows, open_text

    longest = getattr(origin.config, "max_position_embeddings", None)
    if longest and seq_len > longest:
        raise DataError(f"seq_len {seq_len} is beyond the model's context of {longest} tokens", "Use less")
    opened = open_text(text, "calibrate", origin.tokenizer)
    tokens = evaluation_windows(opened, origin.tokenizer, None, seq_len)
    return tokens, {"name": opened.name, "digest": opened.digest, "smoke": opened.smoke}


def _held_out(origin: Origin, text: str | Path | None, windows: int, seq_len: int) -> tuple[Tensor, Any]:
    from frugallm.evaluate import TextFacts
    from frugallm.text import evaluation_windows, open_text

    opened = open_text(text, "evaluate", origin.tokenizer)
    tokens = evaluation_windows(opened, origin.tokenizer, windows, seq_len)
    return tokens, TextFacts.of(opened, tokens)


def begin_job(job: TrainJob) -> tuple[Any, Any, Tensor]:
    """Return the student, made ready, the teacher if the objective reads one, and the windows to train on."""
    student = job.origin.student(job.settings.seed)
    teacher = job.origin.teacher() if any(step.needs_teacher for step in job.steps) else None
    windows = begin(student, teacher, job.steps, job.origin.family, job.windows, job.settings.seed)
    return student, teacher, windows


def _carry_out(
    job: TrainJob,
    place: Any,
    held_out: tuple[Tensor, Any] | None,
    *,
    verify: bool,
    resumed: bool,
    progress: Progress,
) -> TrainReport:
    from frugallm.evaluate.memory import AnonymousPeak
    from frugallm.training.result import measure, verified, write_folder, write_report

    clock = Clock()
    with AnonymousPeak() as memory:
        if any(step.has_data for step in job.steps):
            progress.event("stage", text="making what is trained on")
        with clock.phase("prepare"):
            student, teacher, windows = begin_job(job)
        before = None if held_out is None else measure(job, None, held_out, progress, clock)
        progress.event("stage", text="training")
        with clock.phase("train"):
            curve = fit(
                student, teacher, job.steps, windows, job.settings, progress, place.path / CHECKPOINTS
            )
    clock.peak_bytes, clock.baseline_bytes = memory.peak, memory.baseline
    del teacher
    progress.event("stage", text="writing the folder")
    with clock.phase("write"):
        layout = write_folder(job, student, place.folder)
    notes = list(layout.notes)
    if verify:
        progress.event("stage", text="verifying")
        with clock.phase("verify"):
            notes.append(verified(job, student, layout, place.folder))
    seen = job.windows if held_out is None else held_out[0]
    notes += [note for step in job.steps for note in step.remarks(student, job.origin.family, seen)]
    del student
    after = None if held_out is None else measure(job, place.folder, held_out, progress, clock)
    if resumed:
        notes.append("resumed: seconds and memory are those of the last part of the training")
    report = write_report(job, place, layout, (before, after), curve, clock, notes)
    place.finish()
    progress.event("done", out=str(place.out), seconds=round(sum(clock.seconds.values()), 3))
    return report
