"""The table of a report: one list of rows, drawn as Markdown and for a terminal (and by the page)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frugallm.evaluate.figures import UNKNOWN, bare, change, figure

if TYPE_CHECKING:
    from rich.table import Table

    from frugallm.evaluate.bootstrap import Measure
    from frugallm.evaluate.report import ModelFacts, Report

SMOKE = "smoke figure"


@dataclass(frozen=True)
class Row:
    """One line: what it is, the cells by model, and the change where there are two models to compare."""

    label: str
    cells: tuple[str, ...]
    change: str = ""
    group: str = ""


def rows(report: Report) -> list[Row]:
    """Return the rows of a report's table; a row that no model has a figure for is left out."""
    parts = dict.fromkeys(part for model in report.models for part in model.part_bytes)
    smoke = f" ({SMOKE})" if report.text is not None and report.text.smoke else ""
    found = [
        _row(report, "size", "weights on disk", "bytes", lambda m: m.file_bytes),
        *(_row(report, "size", f"– {part}", "bytes", _part(part)) for part in parts),
        _row(report, "size", "compressed part", "bits/weight", lambda m: m.compressed_bits),
        _row(report, "size", "whole file", "bits/weight", lambda m: m.whole_bits),
        _row(report, "size", "zeros in pruned linears", "share", lambda m: m.zeros),
        _row(report, "quality", f"perplexity{smoke}", "", lambda m: m.quality and m.quality.perplexity),
        _row(
            report,
            "quality",
            f"– relative{smoke}",
            "ratio",
            lambda m: m.quality and m.quality.perplexity_ratio,
        ),
        _row(report, "quality", f"KL divergence{smoke}", "nats/token", lambda m: m.quality and m.quality.kl),
        _row(report, "quality", f"top-1 agreement{smoke}", "share", lambda m: m.quality and m.quality.top1),
        _verdicts(report),
        _row(report, "speed", "prefill", "tokens/s", lambda m: m.prefill),
        _row(report, "speed", "decode", "tokens/s", lambda m: m.decode),
        _row(report, "speed", "memory in use", "bytes", lambda m: m.peak_bytes),
    ]
    return [row for row in found if any(cell != UNKNOWN for cell in row.cells)]


def _part(name: str) -> Callable[[ModelFacts], int | None]:
    return lambda model: model.part_bytes.get(name)


def _row(report: Report, group: str, label: str, unit: str, pick: Callable[[ModelFacts], Any]) -> Row:
    """Write one figure of every model; a figure is a number, or has ``value``, ``low`` and ``high``."""
    values, cells = [], []
    for model in report.models:
        found = pick(model)
        value = getattr(found, "value", found)
        values.append(value)
        written = figure(value, unit, getattr(found, "low", None), getattr(found, "high", None))
        cells.append(bare(written, unit))
    relative = unit in ("bytes", "bits/weight", "tokens/s", "")
    comparable = relative and [m.role for m in report.models] == ["before", "after"]
    label += f", {unit}" if unit in ("bits/weight", "nats/token", "tokens/s") else ""
    return Row(label, tuple(cells), change(*values) if comparable else "", group)


def _verdicts(report: Report) -> Row:
    cells = []
    for model in report.models:
        verdict = model.quality.verdict if model.quality is not None else None
        cells.append("original" if model.role == "before" and verdict else verdict or UNKNOWN)
    judged = any(m.role == "after" and m.quality is not None and m.quality.verdict for m in report.models)
    return Row("verdict", tuple(cells) if judged else (UNKNOWN,) * len(cells), "", "quality")


#: Heads of :func:`share_rows`, but for the first column.
SHARE_HEADS = (
    "in its place",
    "KL divergence, nats/token",
    "KL that the step takes away",
    "perplexity",
    "whole file, bits/weight",
)
SHARES_EXPLAINED = (
    "The recipe was compressed and evaluated once more without each step, on the same windows and with the same seed. "
    "Where a step rounds or prunes, its plain form took its place, so that the result keeps its form. Below zero a step "
    "does harm; shares need not add up."
)


def share_rows(report: Report) -> list[Row]:
    """Return the table of the steps' shares, the whole recipe first; empty if they were not measured."""
    whole = next((m for m in report.models if m.role == "after"), None)
    if not report.shares or whole is None or whole.quality is None:
        return []
    found = [
        _share_row("whole recipe", "", whole.quality.kl, None, whole.quality.perplexity, whole.whole_bits)
    ]
    for share in report.shares:
        instead = f"not measured: {share.reason}" if share.reason else " ".join(share.instead) or "nothing"
        found.append(
            _share_row(
                f"without {share.step}", instead, share.kl, share.share, share.perplexity, share.whole_bits
            )
        )
    return found


def _share_row(
    label: str,
    instead: str,
    kl: Measure | None,
    share: Measure | None,
    perplexity: Measure | None,
    bits: float | None,
) -> Row:
    measures = [
        figure(m.value, "", m.low, m.high) if m is not None else UNKNOWN for m in (kl, share, perplexity)
    ]
    return Row(label, (instead, *measures, bare(figure(bits, "bits/weight"), "bits/weight")))


def facts(report: Report) -> list[tuple[str, str]]:
    """Return what is needed to make and to measure the result again, as pairs of words."""
    job, found = report.job, []
    if job is not None:
        took = ", ".join(f"{phase} {figure(s, 's')}" for phase, s in job.seconds.items())
        memory = figure(job.peak_bytes, "bytes")
        if job.peak_bytes is not None and job.baseline_bytes is not None:
            memory += f" ({figure(job.baseline_bytes, 'bytes')} before it began)"
        found += [
            ("recipe", " ".join(job.recipe)),
            ("command", job.command),
            ("time", took),
            ("peak memory of compression", memory if job.peak_bytes is not None else ""),
            ("calibration text", _calibration(report)),
            ("seed", str(job.seed)),
            ("original's weights", f"sha256 {job.model_digest}" if job.model_digest else ""),
        ]
    found += [("evaluation text", _evaluation_text(report)), *_machine(report)]
    return [(name, value) for name, value in found if value]


def _calibration(report: Report) -> str:
    job = report.job
    if job is None or job.calibration is None:
        return ""
    used = f", {job.samples} windows of {job.seq_len} tokens" if job.samples else ""
    return f"{job.calibration.name}{used}, sha256 {job.calibration.digest[:16]}"


def _evaluation_text(report: Report) -> str:
    quality = next((m.quality for m in report.models if m.quality is not None), None)
    if quality is None:
        return ""
    name = quality.text.name if quality.text is not None else "windows given"
    bos = "a BOS token at the start of each" if quality.bos else "no BOS token"
    digest = f", sha256 {quality.text.digest[:16]}" if quality.text is not None else ""
    return (
        f"{name}, {quality.windows} windows of {quality.window_length} tokens, {bos}{digest}; "
        f"{quality.dtype}; intervals: 95 %, paired bootstrap over windows, seed {quality.seed}"
    )


def _machine(report: Report) -> list[tuple[str, str]]:
    if report.job is None:
        return []
    machine = dict(report.job.machine)
    where = [str(machine[key]) for key in ("cpu", "os") if machine.get(key)]
    if machine.get("threads"):
        where.append(f"{machine['threads']} threads on {machine.get('cores', '?')} cores")
    if machine.get("memory_bytes"):
        where.append(figure(machine["memory_bytes"], "bytes"))
    if machine.get("load") is not None:
        where.append(f"load {machine['load']}")
    packages = ", ".join(f"{name} {version}" for name, version in report.job.versions.items())
    python = f"python {machine['python']}, " if machine.get("python") else ""
    return [
        ("machine", ", ".join(where)),
        ("processor features", ", ".join(machine.get("flags", []))),
        ("versions", python + packages if packages else ""),
    ]


def remarks(report: Report) -> list[str]:
    """Return the notes, and what must be said about the figures themselves."""
    found = list(report.notes)
    if report.text is not None and report.text.smoke:
        found.append(
            f"Quality is a {SMOKE}: the embedded text ({report.text.name}) is small and technical. "
            "Name a text of your own (--eval-text, --text) for figures to quote."
        )
    found += dict.fromkeys(m.quality.note for m in report.models if m.quality is not None and m.quality.note)
    return found


def markdown(report: Report) -> str:
    """Return the report as Markdown."""
    table = rows(report)
    changed = any(row.change for row in table)
    heads = [m.name for m in report.models] + (["change"] if changed else [])
    lines = [f"# {_cell(report.title)}", "", "| | " + " | ".join(map(_cell, heads)) + " |"]
    lines.append("| --- |" + " ---: |" * len(heads))
    for row in table:
        cells = [row.label, *row.cells] + ([row.change] if changed else [])
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    lines += _shares_markdown(report)
    if any(model.answer for model in report.models):
        lines += ["", "## The same question", "", f"> {_cell(report.prompt)}"]
        for model in report.models:
            lines += ["", f"**{_cell(model.name)}**: {_cell(model.answer)}"]
    if report.how_to_load:
        lines += ["", "## How to load it"]
        for engine, snippet in report.how_to_load.items():
            lines += ["", f"{engine}:", "", "```", snippet.rstrip("\n"), "```"]
    lines += ["", "## How it was made and measured", ""]
    lines += [f"- {name}: {_cell(value)}" for name, value in facts(report)]
    if remarks(report):
        lines += ["", *(f"- Note: {_cell(note)}" for note in remarks(report))]
    return "\n".join(lines) + "\n"


def _shares_markdown(report: Report) -> list[str]:
    table = share_rows(report)
    if not table:
        return []
    lines = ["", "## What each step gives", "", SHARES_EXPLAINED, "", "| | " + " | ".join(SHARE_HEADS) + " |"]
    lines.append("| --- | --- |" + " ---: |" * (len(SHARE_HEADS) - 1))
    return lines + ["| " + " | ".join(map(_cell, (row.label, *row.cells))) + " |" for row in table]


def _cell(text: str) -> str:
    """Keep a text in its cell: on one line, with bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def terminal(report: Report) -> Table:
    """Return the table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(report.title), title_justify="left", pad_edge=False)
    found = rows(report)
    changed = any(row.change for row in found)
    table.add_column("")
    for model in report.models:
        table.add_column(Text(model.name), justify="right", overflow="fold")
    if changed:
        table.add_column("change", justify="right")
    for index, row in enumerate(found):
        ends = index + 1 == len(found) or found[index + 1].group != row.group
        cells = [row.label, *row.cells] + ([row.change] if changed else [])
        table.add_row(*map(Text, cells), end_section=ends)
    return table
