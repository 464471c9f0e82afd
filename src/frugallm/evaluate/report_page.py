"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

from frugallm.evaluate.figures import change, figure
from frugallm.evaluate.report_plots import plots
from frugallm.evaluate.report_table import (
    SHARE_HEADS,
    SHARES_EXPLAINED,
    SMOKE,
    facts,
    remarks,
    rows,
    share_rows,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from frugallm.evaluate.report import Report

TEMPLATE = "report.html.jinja"


def page(report: Report) -> str:
    """Return the report as one HTML page with everything inside it, plotting code included."""
    from jinja2 import Environment, StrictUndefined

    # Names, answers and notes come from models and files: all of it is escaped.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("frugallm.evaluate").joinpath(TEMPLATE).read_text("utf-8")
    drawn = plots(report)
    table = rows(report)
    return environment.from_string(source).render(
        report=report,
        rows=table,
        changed=any(row.change for row in table),
        tiles=tiles(report),
        plots=[{"title": t, "text": x, "html": _html(f, first=not i)} for i, (t, x, f) in enumerate(drawn)],
        shares={"heads": SHARE_HEADS, "text": SHARES_EXPLAINED, "rows": share_rows(report)},
        facts=facts(report),
        remarks=remarks(report),
        smoke=SMOKE if report.text is not None and report.text.smoke else "",
    )


def tiles(report: Report) -> list[dict[str, str]]:
    """Return the few figures that stand above all others, for one original and one result."""
    if [model.role for model in report.models] != ["before", "after"]:
        return []
    before, after = report.models
    found = []
    if before.file_bytes and after.file_bytes:
        saved = change(before.file_bytes, after.file_bytes)
        found.append(_tile("weights on disk", figure(after.file_bytes, "bytes"), saved))
    if after.quality is not None:
        quality = after.quality
        moved = change(before.quality.perplexity.value, quality.perplexity.value) if before.quality else ""
        verdict = quality.verdict or ""
        found.append(_tile("perplexity", figure(quality.perplexity.value), moved, verdict))
        if quality.kl is not None:
            agreement = f"top-1 agreement {figure(quality.top1.value, 'share')}" if quality.top1 else ""
            found.append(_tile("KL divergence, nats/token", figure(quality.kl.value), agreement))
    if before.decode and after.decode:
        faster = change(before.decode.value, after.decode.value)
        found.append(_tile("decode in transformers", figure(after.decode.value, "tokens/s"), faster))
    return found


def _tile(label: str, value: str, below: str, verdict: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "below": below, "verdict": verdict}


def _html(drawn: Figure, *, first: bool) -> Any:
    """Return a plot as HTML; the first one brings the plotting code."""
    from markupsafe import Markup
    from plotly.io import to_html

    return Markup(
        to_html(
            drawn,
            full_html=False,
            include_plotlyjs=first,
            config={"displayModeBar": False, "responsive": True},
        )
    )
