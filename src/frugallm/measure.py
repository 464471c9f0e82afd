"""Before and after: verify the folder, and measure quality, speed and memory of both models in one run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frugallm.evaluate import Evaluation, TextFacts, evaluate_all
from frugallm.formats.engines import loads_in_transformers
from frugallm.formats.folder import write_dense
from frugallm.formats.stored import model_in_memory
from frugallm.formats.verify import (
    ROUNDED_INPUT_TOLERANCE,
    WEIGHT_ONLY_TOLERANCE,
    Outside,
    ask_outside,
    compare,
)
from frugallm.job import Job, Workplace
from frugallm.progress import Progress
from frugallm.text import leading_bos

if TYPE_CHECKING:
    from frugallm.compression import Clock
    from frugallm.evaluate.shares import StepShare

PROMPT = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 48
CHECKED_TOKENS = (2, 48)  # prompts, tokens each
SPEED = {"prefill": 512, "decode": 32, "runs": 3}


@dataclass
class Measured:
    """What was found out about the model before and after."""

    verification: dict[str, float] | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    outside_before: dict[str, Any] = field(default_factory=dict)
    outside_after: dict[str, Any] = field(default_factory=dict)
    shares: list[StepShare] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def checked_ids(job: Job) -> Tensor:
    """Return the fixed prompts for verification, ``(prompts, tokens)``: seeded ids from the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, job.checkpoint.config.vocab_size, CHECKED_TOKENS, generator=generator)


def measure_before_and_after(
    job: Job,
    place: Workplace,
    held_out: tuple[Tensor, TextFacts] | None,
    *,
    verify: bool,
    clock: Clock,
    progress: Progress,
) -> Measured:
    """Verify the finished folder and measure it against the original."""
    measured = Measured()
    outside: Outside | None = None
    if not loads_in_transformers(job.plan):
        measured.notes.append("not verified: plain transformers does not load this scheme")
        progress.event("warn", text=measured.notes[-1])
    elif verify or held_out is not None:
        progress.event("stage", text="loading the folder in a process without FrugalLM")
        with clock.phase("verify"):
            outside = _ask(job, place, speed=held_out is not None)
            measured.outside_after = outside.facts
    if verify and outside is not None:
        progress.event("stage", text="verifying")
        with clock.phase("verify"):
            measured.verification = _verify(job, place, outside)
    del outside
    if held_out is not None:
        with clock.phase("speed"):
            progress.event("stage", text="measuring the original in the same way")
            measured.outside_before = _original_outside(job, place)
        with clock.phase("evaluate"):
            _evaluate(job, place, held_out, measured, progress)
    return measured


def _ask(job: Job, place: Workplace, *, speed: bool) -> Outside:
    return ask_outside(
        place.folder,
        checked_ids(job).tolist(),
        dtypes={"default": None, "float32": "float32"},
        threads=job.threads,
        prompt=PROMPT if speed else None,
        answer_tokens=ANSWER_TOKENS,
        speed=_speed_request(job) if speed else None,
    )


def _speed_request(job: Job) -> dict[str, Any]:
    context = getattr(job.checkpoint.config, "max_position_embeddings", 1024)
    prefill = min(SPEED["prefill"], context // 2)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, job.checkpoint.config.vocab_size, (1, prefill), generator=generator)
    return {"ids": ids.tolist(), "decode": min(SPEED["decode"], context // 4), "runs": SPEED["runs"]}


def _verify(job: Job, place: Workplace, seen: Outside) -> dict[str, float]:
    rounded = any(p.scheme.activations is not None for p in job.plan.linears.values())
    model = model_in_memory(place.stored(job))
    return compare(
        model,
        model.get_submodule(job.checkpoint.family.blocks),
        seen,
        checked_ids(job),
        tolerance=ROUNDED_INPUT_TOLERANCE if rounded else WEIGHT_ONLY_TOLERANCE,
        folder=place.folder,
    )


def _original_outside(job: Job, place: Workplace) -> dict[str, Any]:
    """Measure a dense copy of the original in a process of its own, as the result was measured."""
    folder = place.path / "original"
    if folder.exists():
        shutil.rmtree(folder)
    write_dense(job.given, folder, job.stored)
    try:
        seen = ask_outside(
            folder,
            checked_ids(job)[:1].tolist(),
            dtypes={"default": None},
            threads=job.threads,
            prompt=PROMPT,
            answer_tokens=ANSWER_TOKENS,
            speed=_speed_request(job),
        )
    finally:
        shutil.rmtree(folder)
    return seen.facts


def _evaluate(
    job: Job, place: Workplace, held_out: tuple[Tensor, TextFacts], measured: Measured, progress: Progress
) -> None:
    windows, text = held_out
    tokenizer = job.checkpoint.tokenizer
    result: Any = place.folder
    if not loads_in_transformers(job.plan):
        result = model_in_memory(place.stored(job))
        measured.notes.append("quality is that of the stored values, read by FrugalLM itself")
    results = evaluate_all(
        {"before": job.given, "after": result},
        job.given,
        windows,
        text=text,
        bos=leading_bos(tokenizer) is not None,
        tokenizer=tokenizer,
        seed=job.seed,
        progress=progress,
    )
    measured.before, measured.after = results["before"], results["after"]
