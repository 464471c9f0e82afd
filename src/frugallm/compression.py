"""The main job: compress a model, prove what it cost, hand it on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugallm.errors import DataError, FrugalError, ParameterError, nearest
from frugallm.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from frugallm.evaluate.report import Report
    from frugallm.job import Job, Workplace
    from frugallm.method import Method
    from frugallm.models.checkpoint import Checkpoint
    from frugallm.recipe import Recipe

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
#: Weights of a whole model in float32, once here and once in the process that verifies, and room to compute.
BYTES_PER_WEIGHT_TO_VERIFY = 10
#: Folder of the unfinished work in which the recipe without a step is compressed.
SHARES = "shares"


@dataclass
class Clock:
    """Seconds by phase and the peak of anonymous memory while compressing."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    baseline_bytes: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block of code to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run(
    model: Any,
    steps: Recipe | str | Path | Method | Iterable[Method | str],
    *,
    out: str | Path,
    tokenizer: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    text: str | Path | None = None,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    eval_text: str | Path | None = None,
    windows: int = 8,
    evaluate: bool = True,
    verify: bool = True,
    shares: bool = False,
    dtype: str = "bf16",
    device: str = "cpu",
    threads: int | None = None,
    hidden_limit: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compress a model and write it, with what it cost, to a new folder.

    Parameters
    ----------
    model
        A name, a folder, a GGUF file or a loaded ``transformers`` model (which needs ``tokenizer``).
    steps
        A :class:`~frugallm.recipe.Recipe`, a recipe file or preset, methods, or steps as on the command line.
    out
        The folder to write. Unfinished work lies beside it, in ``out`` + ``.partial``.
    resume, overwrite
        Go on with unfinished work; or remove what is there first.
    text, samples, seq_len
        Calibration text (``None``: the embedded one) and how many windows of how many tokens of it.
    seed
        Of every random choice.
    eval_text, windows
        Held-out text (``None``: the embedded one, smoke figures) and how many windows of 2048 tokens.
    evaluate, verify
        Measure quality and speed; load the result in a process of its own and compare.
    shares
        Measure what each step gives, by leaving it out: one more compression and evaluation a step.
    dtype
        Type of tensors that stay uncompressed: ``bf16``, ``fp16`` or ``fp32``.
    threads
        Processor threads; ``None``: as many as torch uses.
    hidden_limit
        Bytes of hidden states that stay in memory (default: 128 MiB); more are kept in a file.

    Returns
    -------
    Report
        What was measured; also written to the folder.

    Raises
    ------
    FrugalError
        Bad input; nothing is left behind. ``JobError`` if the result does not verify: the work stays.

    Examples
    --------
    >>> import frugallm
    >>> frugallm.run("smollm2-135m", ["gptq:bits=4"], out="runs/demo")  # doctest: +SKIP
    """
    progress = progress or Progress()
    _check_numbers(samples=samples, seq_len=seq_len, seed=seed, windows=windows, threads=threads)
    _check_shares(shares, evaluate, windows)
    job, place = _prepare(
        model,
        steps,
        out,
        tokenizer,
        text,
        samples,
        seq_len,
        seed,
        dtype,
        device,
        threads,
        hidden_limit,
        progress,
    )
    from frugallm.evaluate.report import Report
    from frugallm.report_files import MEASUREMENTS

    held_out = _held_out(job, eval_text, windows) if evaluate else None
    if not place.prepare(job, resume=resume, overwrite=overwrite):
        finished = Report.from_json((place.out / MEASUREMENTS).read_text(encoding="utf-8"))
        lacks = ", without the steps' shares: --overwrite it" if shares and not finished.shares else ""
        progress.event("note", text=f"{place.out} is finished already{lacks}")
        progress.event("done", out=str(place.out), seconds=0.0)
        return finished
    try:
        return _carry_out(
            job, place, held_out, verify=verify, shares=shares, resumed=resume, progress=progress
        )
    except FrugalError as error:
        if error.status == FrugalError.status:  # bad input that only the work itself could find
            place.abandon()
        raise


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        least = {"seed": 0, "seq_len": 2}.get(name, 1)
        if number is not None and not least <= number < 2**63:
            raise ParameterError(f"{name} must be {least} or more, in 63 bits; got {number}")


def _check_shares(shares: bool, evaluate: bool, windows: int) -> None:
    if shares and not evaluate:
        raise ParameterError(
            "the steps' shares are measured by evaluating, and nothing is to be evaluated",
            "Leave out --no-evaluate, or --shares",
        )
    if shares and windows < 2:
        raise ParameterError(
            "the steps' shares need at least two evaluation windows; one has no interval", "Use --windows 8"
        )


def _prepare(
    model: Any,
    steps: Any,
    out: str | Path,
    tokenizer: Any,
    text: str | Path | None,
    samples: int,
    seq_len: int,
    seed: int,
    dtype: str,
    device: str,
    threads: int | None,
    hidden_limit: int | None,
    progress: Progress,
) -> tuple[Job, Workplace]:
    """Read and check all input; nothing is written."""
    if dtype not in DTYPES:
        raise ParameterError(
            f"dtype must be one of {', '.join(DTYPES)}; got '{dtype}'", nearest(dtype, DTYPES)
        )
    if device != "cpu":
        raise ParameterError(
            f"device '{device}' is not supported yet", "The walk runs on the CPU: --device cpu"
        )
    from frugallm.recipe import Recipe

    recipe = Recipe.of(steps)
    import torch

    from frugallm.compress.plan import make_plan
    from frugallm.compress.prepare import prepared
    from frugallm.evaluate.precision import fast_dtype
    from frugallm.job import Job, Workplace, needs_text
    from frugallm.models.open import open_checkpoint
    from frugallm.walk.hidden import HIDDEN_LIMIT

    if threads is not None:
        torch.set_num_threads(threads)
    progress.event("stage", text="reading the model")
    original = open_checkpoint(model, tokenizer)
    checkpoint = prepared(recipe.steps, original, seed)
    plan = make_plan(recipe.steps, checkpoint)
    _check_dtype(plan, dtype)
    tokens, facts = None, None
    if needs_text(plan):
        tokens, facts = _calibration(checkpoint, text, samples, seq_len, seed)
    place = Workplace(Path(out))
    progress.event("start", model=checkpoint.name, recipe=" ".join(recipe.to_cli()), out=str(place.out))
    job = Job(
        checkpoint,
        recipe,
        plan,
        tokens,
        facts,
        seed,
        getattr(torch, DTYPES[dtype]),
        fast_dtype(),
        torch.get_num_threads(),
        HIDDEN_LIMIT if hidden_limit is None else hidden_limit,
        original,
    )
    for note in job.notes:
        progress.event("note", text=note)
    _note_engines(plan, progress)
    return job, place


def _check_dtype(plan: Any, dtype: str) -> None:
    """Refuse a type of what is not compressed in which the result would not run."""
    from frugallm.formats.engines import grids

    if dtype != "bf16" and grids(plan) & {"mxfp4", "nvfp4"}:
        raise ParameterError(
            f"transformers decodes FP4 weights to bf16, and the rest would be stored in {dtype}",
            "Leave dtype out, or use grid=fp4, which FrugalLM alone reads",
        )


def _note_engines(plan: Any, progress: Progress) -> None:
    """Say beforehand what will not load the result."""
    from frugallm.formats.engines import engines_for, loads_in_transformers

    if not loads_in_transformers(plan):
        refusal = next((r for r in engines_for(plan) if r.engine == "transformers"), None)
        progress.event(
            "warn", text=f"transformers will not load the result: {refusal.note if refusal else 'no row'}"
        )


def _calibration(
    checkpoint: Checkpoint, text: str | Path | None, samples: int, seq_len: int, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    from frugallm.text import calibration_windows, open_text

    longest = getattr(checkpoint.config, "max_position_embeddings", None)
    if longest and seq_len > longest:
        raise DataError(f"seq_len {seq_len} is beyond the model's context of {longest} tokens", "Use less")
    opened = open_text(text, "calibrate", checkpoint.tokenizer)
    tokens = calibration_windows(opened, checkpoint.tokenizer, samples, seq_len, seed)
    return tokens, {"name": opened.name, "digest": opened.digest, "smoke": opened.smoke}


def _held_out(job: Job, text: str | Path | None, windows: int) -> tuple[Tensor, Any]:
    from frugallm.evaluate import TextFacts
    from frugallm.text import evaluation_windows, open_text

    opened = open_text(text, "evaluate", job.checkpoint.tokenizer)
    longest = min(2048, getattr(job.checkpoint.config, "max_position_embeddings", 2048))
    tokens = evaluation_windows(opened, job.checkpoint.tokenizer, windows, longest)
    return tokens, TextFacts.of(opened, tokens)


def _carry_out(
    job: Job,
    place: Workplace,
    held_out: tuple[Tensor, Any] | None,
    *,
    verify: bool,
    shares: bool,
    resumed: bool,
    progress: Progress,
) -> Report:
    from frugallm.evaluate.memory import AnonymousPeak, available_bytes
    from frugallm.evaluate.shares import measure_shares
    from frugallm.job import assemble, compress
    from frugallm.measure import Measured, measure_before_and_after
    from frugallm.report_files import write_report_files

    clock = Clock()
    with clock.phase("compress"), AnonymousPeak() as memory:
        job = compress(job, place, progress)
    clock.peak_bytes, clock.baseline_bytes = memory.peak, memory.baseline
    progress.event("stage", text="writing the folder")
    with clock.phase("write"):
        assemble(job, place)
    measured = Measured()
    need = _verification_bytes(job.checkpoint)
    room = available_bytes()
    if need > room and (verify or held_out is not None):
        measured.notes.append(
            f"not verified and not measured: that needs about {need / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB are free"
        )
        progress.event("warn", text=measured.notes[-1])
    elif verify or held_out is not None:
        measured = measure_before_and_after(
            job, place, held_out, verify=verify, clock=clock, progress=progress
        )
    if shares and held_out is not None and measured.after is not None:
        with clock.phase("shares"):
            measured.shares = measure_shares(job, place.path / SHARES, held_out[0], measured.after, progress)
    report = write_report_files(job, place, measured, clock, resumed=resumed)
    place.finish()
    progress.event("done", out=str(place.out), seconds=round(sum(clock.seconds.values()), 3))
    return report


def _verification_bytes(checkpoint: Checkpoint) -> int:
    import math

    weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    return BYTES_PER_WEIGHT_TO_VERIFY * weights
