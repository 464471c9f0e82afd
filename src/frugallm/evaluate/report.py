"""The report: measured facts of models side by side, as JSON, Markdown, a terminal table and an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from frugallm.errors import DataError
from frugallm.evaluate.evaluation import Evaluation, TextFacts
from frugallm.evaluate.shares import StepShare
from frugallm.evaluate.speed import Rate

if TYPE_CHECKING:
    from rich.table import Table


class ModelFacts(BaseModel):
    """What is known about one model.

    Attributes
    ----------
    name, role
        What it is called, and whether it is the original or a result.
    part_bytes
        Bytes of weights on disk by part: ``"embedding and head"``, ``"blocks"``, ``"other"``.
    file_bytes
        Bytes of all weight files of the folder.
    compressed_bits, whole_bits
        Bits per weight of the compressed part, and of the whole file, scales and all.
    zeros
        Share of zeros among the weights of the linears that were pruned.
    quality
        Perplexity, KL divergence, top-1 agreement and verdict.
    prefill, decode
        Speed in plain ``transformers``.
    peak_bytes
        Anonymous memory of a process that loads and runs the model.
    answer
        What it answered to the report's prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    role: Literal["before", "after"] = "after"
    part_bytes: dict[str, int] = {}
    file_bytes: int | None = None
    compressed_bits: float | None = None
    whole_bits: float | None = None
    zeros: float | None = None
    quality: Evaluation | None = None
    prefill: Rate | None = None
    decode: Rate | None = None
    peak_bytes: int | None = None
    answer: str = ""


class JobFacts(BaseModel):
    """How a result was made, so that it can be made again.

    Attributes
    ----------
    recipe, settings
        The steps as on a command line, and with all defaults written out.
    command
        What was typed, if it was typed.
    seconds
        Wall time by phase.
    baseline_bytes, peak_bytes
        Anonymous memory at the start of compression and its peak.
    model_digest
        sha256 over the original's weights.
    calibration, samples, seq_len
        Calibration text, and windows taken from it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: list[str] = []
    settings: list[dict[str, Any]] = []
    command: str = ""
    seconds: dict[str, float] = {}
    baseline_bytes: int | None = None
    peak_bytes: int | None = None
    model_digest: str = ""
    calibration: TextFacts | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int = 0
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}


class LayerError(BaseModel):
    """The error of one linear on calibration data, and that of the naive baseline on the same data."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    name: str
    error: float
    baseline_error: float | None = None


class Report(BaseModel):
    """Measured facts of one or many models side by side.

    Attributes
    ----------
    title
        What the page is called.
    models
        The original first.
    job
        How the result was made; ``None`` for a comparison of several.
    prompt
        What the models' answers answer.
    how_to_load
        Engine → what to type.
    layers
        Errors by linear, in order of the model.
    zeros
        Share of zeros by linear, of those that were pruned.
    shares
        What comes of the recipe without each of its steps, in order, where that was measured.
    notes
        What else a reader must know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    models: list[ModelFacts]
    job: JobFacts | None = None
    prompt: str = ""
    how_to_load: dict[str, str] = {}
    layers: list[LayerError] = []
    zeros: dict[str, float] = {}
    shares: list[StepShare] = []
    notes: list[str] = []

    def to_json(self) -> str:
        """Return everything as JSON; :meth:`from_json` reads it."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read what :meth:`to_json` wrote."""
        return cls.model_validate_json(text)

    def to_markdown(self) -> str:
        """Return the table, answers, how to load, and notes as Markdown."""
        from frugallm.evaluate.report_table import markdown

        return markdown(self)

    def to_html(self) -> str:
        """Return one self-contained page: no network, light and dark, phone and desktop."""
        from frugallm.evaluate.report_page import page

        return page(self)

    def terminal_table(self) -> Table:
        """Return the table for a terminal."""
        from frugallm.evaluate.report_table import terminal

        return terminal(self)

    @property
    def text(self) -> TextFacts | None:
        """The text that quality was measured on."""
        return next((m.quality.text for m in self.models if m.quality is not None), None)


def merge(reports: Sequence[Report], title: str = "Models side by side") -> Report:
    """Put the models of several reports side by side; an original that they share appears once.

    Raises
    ------
    DataError
        If quality was measured on different windows, so that figures cannot be compared.
    """
    kept: list[ModelFacts] = []
    measured: tuple[Any, ...] | None = None
    for report in reports:
        for model in report.models:
            if model.quality is not None:
                now = _setting(model.quality)
                measured = measured or now
                if now != measured:
                    raise DataError(
                        f"{model.name} was measured on other text or windows than {kept[0].name}",
                        "Evaluate all models on the same text, windows and window length",
                    )
            if not any(_same_original(model, other) for other in kept):
                kept.append(model)
    kept.sort(key=lambda model: model.role != "before")
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    prompts = {report.prompt for report in reports}
    return Report(
        title=title, models=kept, prompt=prompts.pop() if len(prompts) == 1 else "", notes=list(notes)
    )


def _setting(quality: Evaluation) -> tuple[Any, ...]:
    text = quality.text.digest if quality.text is not None else None
    return text, quality.windows, quality.window_length, quality.bos


def _same_original(model: ModelFacts, other: ModelFacts) -> bool:
    return model.role == other.role == "before" and model.name == other.name
