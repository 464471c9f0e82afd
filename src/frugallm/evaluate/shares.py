"""What each step of a recipe gives: the recipe is compressed and evaluated once more without it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from frugallm.errors import FrugalError
from frugallm.evaluate.bootstrap import Measure, measure
from frugallm.progress import Progress

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench
    from frugallm.evaluate.evaluation import Evaluation
    from frugallm.job import Job
    from frugallm.method import Method

#: Names of linears that a step is limited to are written out up to so many.
NAMES = 3


class StepShare(BaseModel):
    """What comes of a recipe without one of its steps.

    Attributes
    ----------
    step
        The step, as on a command line.
    instead
        Plain steps that took its place, so that the result has the same form; empty: it was dropped.
    kl, perplexity
        Of the recipe without the step.
    share
        KL divergence without the step minus that of the whole recipe, in nats/token; the interval is paired over
        windows. Above zero the step brings the model closer to the original, below zero it does harm.
    whole_bits
        Bits per weight of the whole file without the step.
    reason
        Why there are no figures, if there are none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    step: str
    instead: list[str] = []
    kl: Measure | None = None
    share: Measure | None = None
    perplexity: Measure | None = None
    whole_bits: float | None = None
    reason: str = ""


class _Blocks(Progress):
    """Passes on how far a recipe without a step is; its blocks are not those of the job."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def event(self, kind: str, **facts: Any) -> None:
        if kind == "block":
            self._progress.event("compared block", **facts)


def measure_shares(
    job: Job, scratch: Path, windows: Tensor, whole: Evaluation, progress: Progress
) -> list[StepShare]:
    """Compress and evaluate a finished job's recipe without each of its steps.

    Calibration windows, seed and types are those of the job, held-out windows and reference those of ``whole``.

    Parameters
    ----------
    scratch
        Folder for the results, one at a time; what an earlier try left there is removed, and so is the folder itself.
    windows
        Held-out token ids ``(windows, length)``.
    whole
        What was measured of the whole recipe.
    """
    from frugallm.evaluate.bench import Bench, compress_for_evaluation

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    compress = partial(
        compress_for_evaluation,
        seed=job.seed,
        stored=job.stored,
        hidden_limit=job.hidden_limit,
        progress=_Blocks(progress),
    )
    calibration = windows.new_empty((0, 0)) if job.windows is None else job.windows
    names = job.recipe.to_cli()
    found = []
    with Bench(
        job.given, calibration, windows, compress, seed=job.seed, progress=progress, scratch=scratch
    ) as bench:
        for index, name in enumerate(names):
            progress.event("stage", text=f"leaving out {name} (step {index + 1} of {len(names)})")
            try:
                found.append(_share(bench, job, index, name, whole))
            except FrugalError as error:  # the result itself is finished, and stays
                found.append(StepShare(step=name, reason=error.message))
    shutil.rmtree(scratch)
    return found


def _share(bench: Bench, job: Job, index: int, name: str, whole: Evaluation) -> StepShare:
    from frugallm.compress.leave_out import leave_out

    left = leave_out(job.recipe.steps, index, job.given, job.seed, job.plan.schemes())
    without = bench.evaluate(*left.steps)
    with_it, without_it = (torch.tensor(e.kl_per_window, dtype=torch.float64) for e in (whole, without))
    return StepShare(
        step=name,
        instead=[_written(step) for step in left.instead],
        kl=without.kl,
        share=measure(without_it - with_it, "nats/token", job.seed),
        perplexity=without.perplexity,
        whole_bits=bench.file_bits(*left.steps),
    )


def _written(step: Method) -> str:
    """Write a step as on a command line, long lists of linears by their number."""
    from frugallm.recipe import Recipe

    only = getattr(step, "only", ())
    if len(only) <= NAMES:
        return Recipe(steps=(step,)).to_cli()[0]
    return f"{Recipe(steps=(step.model_copy(update={'only': ()}),)).to_cli()[0]} on {len(only)} linears"
