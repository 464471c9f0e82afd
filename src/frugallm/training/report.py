"""The report of a training."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict

from frugallm.evaluate import Evaluation

MEASUREMENTS = "measurements.json"


class TrainReport(BaseModel):
    """What was measured of a training.

    Attributes
    ----------
    title, model, from_scratch, recipe, identity
        What was trained, and everything that decided it.
    stored
        What the linears are stored as.
    file_bytes, coded_weights
        Bytes of the files of weights, and how many weights in them are codes.
    tokens
        Tokens seen, repetitions counted.
    curve
        ``{"step", "loss"}``, the objective as it went.
    before, after
        Figures on held-out text: of what it began with, and of the folder as stored.
    seconds, peak_bytes
        By phase; the most anonymous memory while training.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    model: str
    from_scratch: bool
    recipe: list[str]
    identity: dict[str, Any]
    stored: str
    file_bytes: int
    coded_weights: int
    tokens: int
    curve: list[dict[str, float]]
    before: Evaluation | None = None
    after: Evaluation | None = None
    seconds: dict[str, float] = {}
    peak_bytes: int = 0
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    notes: list[str] = []
    how_to_load: str = ""

    def to_markdown(self) -> str:
        """Return the report as Markdown: a table of before and after, notes, how to load it."""
        lines = [f"## {self.title}", "", "|  | before | after |", "| --- | --- | --- |"]
        lines += [
            f"| {name} | {_show(self.before, get)} | {_show(self.after, get)} |"
            for name, get in _FIGURES.items()
        ]
        first, last = (self.curve[0], self.curve[-1]) if self.curve else ({}, {})
        if first:
            lines.append(f"| objective while training | {first['loss']:.4g} | {last['loss']:.4g} |")
        lines += ["", f"Stored: {self.stored}; {self.file_bytes:,} bytes of weights."]
        lines.append(f"Tokens seen: {self.tokens:,}. Seconds: {_seconds(self.seconds)}.")
        if self.after is not None and self.after.text is not None and self.after.text.smoke:
            lines.append("Smoke figures: held-out text is the embedded one.")
        lines += ["", *(f"- {note}" for note in self.notes)]
        lines += ["", "```python", self.how_to_load, "```", ""]
        return "\n".join(lines)


def _loss(evaluation: Evaluation) -> str:
    return f"{math.fsum(evaluation.nll_per_window) / len(evaluation.nll_per_window):.4f}"


def _perplexity(evaluation: Evaluation) -> str:
    return f"{evaluation.perplexity.value:.2f}"


def _kl(evaluation: Evaluation) -> str:
    return "" if evaluation.kl is None else f"{evaluation.kl.value:.4f}"


_FIGURES = {
    "loss on held-out text, nats/token": _loss,
    "perplexity": _perplexity,
    "KL to the model given, nats/token": _kl,
}


def _show(evaluation: Evaluation | None, get: Any) -> str:
    return "" if evaluation is None else str(get(evaluation))


def _seconds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
