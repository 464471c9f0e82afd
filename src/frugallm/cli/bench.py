"""``frugal bench``: how fast a model answers here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frugallm.cli.options import Debug, Model, show_markdown

if TYPE_CHECKING:
    from frugallm.engine.speed import Figure, Speed


def bench(
    model: Model,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="processor threads; default: all cores")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="how often everything is measured")] = 5,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="also write everything as JSON")] = None,
    debug: Debug = False,
) -> None:
    """Measure how fast MODEL reads and writes on this machine, and how near that is to its limits."""
    from frugallm.errors import OutputError

    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise OutputError(f"{json} cannot be written", "Give a file in a folder that exists")

    from frugallm.engine.speed import measure
    from frugallm.threads import threads as computing_on

    with computing_on(threads):
        found = measure(model, repeats=repeats)
    if json is not None:
        json.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    show_markdown(table(found))


def table(found: Speed) -> str:
    """Return what was measured as a Markdown table, with what it was held against below."""
    sizes = found.sizes
    rows = {
        f"prefill of {sizes['prefill']}": found.prefill,
        "decode, one stream": found.decode,
        f"batch of {sizes['streams']} × ({sizes['prompt']} → {sizes['answer']})": found.batch,
    }
    lines = [
        f"| {found.model} | tokens/s | slowest to fastest | share of the limit | limit |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {name} | {_cells(figure)} |" for name, figure in rows.items()),
        "",
        f"Process start to first token: {found.start.value:.2f} s. Peak memory: {_megabytes(found)}.",
        "",
        f"{found.threads} threads, {found.path}; medians of {found.start.repeats}. "
        + ", ".join(f"{name} {value / 1e9:.1f} {_UNITS[name]}" for name, value in found.limits.items()),
    ]
    return "\n".join(lines + (["", f"Note: {found.note}"] if found.note else []))


_UNITS = {"memory": "GB/s", "bf16": "GFLOP/s", "int8": "GOP/s"}


def _cells(figure: Figure) -> str:
    share = "not known" if figure.share is None else f"{100 * figure.share:.0f} %"
    rate = figure.rate
    return f"{rate.value:,.1f} | {rate.low:,.1f} to {rate.high:,.1f} | {share} | {figure.limit}"


def _megabytes(found: Speed) -> str:
    parts = {"weights": found.weights_bytes, "room of the cache": found.cache_bytes}
    known = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts.items() if size is not None)
    return f"{found.peak_bytes / 1e6:,.0f} MB" + (f" ({known})" if known else "")
