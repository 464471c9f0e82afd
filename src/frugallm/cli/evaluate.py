"""``frugal evaluate``: perplexity, and the distance to an original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frugallm.cli.options import Debug, Model, show_markdown

if TYPE_CHECKING:
    from frugallm.evaluate import Evaluation


def evaluate(
    model: Model,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="the original, for divergence and agreement")
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="held-out text: file, folder, data set")
    ] = None,
    windows: Annotated[int, typer.Option(metavar="N", help="windows of 2048 tokens")] = 8,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="also write everything as JSON")] = None,
    debug: Debug = False,
) -> None:
    """Measure MODEL on held-out text; with --against also how far it is from the original."""
    from frugallm.progress import Progress

    shown = Progress("auto")

    from frugallm.evaluate import evaluate as measure

    with shown:
        result = measure(model, against=against, text=text, windows=windows, progress=shown)
    if json is not None:
        json.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    show_markdown(table(result))


def table(result: Evaluation) -> str:
    """Return what was measured as a Markdown table with intervals."""
    measures = {
        "perplexity": result.perplexity,
        f"perplexity / {result.against}": result.perplexity_ratio,
        "KL divergence": result.kl,
        "top-1 agreement": result.top1,
    }
    lines = [f"| {result.model} | value | 95 % interval | unit |", "| --- | --- | --- | --- |"]
    for what, found in measures.items():
        if found is not None:
            interval = "" if found.low is None else f"{found.low:.4g} to {found.high:.4g}"
            lines.append(f"| {what} | {found.value:.5g} | {interval} | {found.unit} |")
    smoke = ", a smoke figure" if result.text is not None and result.text.smoke else ""
    text = f"{result.text.name}{smoke}" if result.text is not None else "given windows"
    lines += ["", f"{result.windows} windows of {result.window_length} tokens of {text}; {result.dtype}"]
    if result.verdict is not None:
        lines += ["", f"Verdict: {result.verdict}" + (f" ({result.note})" if result.note else "")]
    return "\n".join(lines)
