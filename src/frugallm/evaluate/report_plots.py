"""The plots of a report: what quality costs, and where in the model the error lies."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from frugallm.evaluate.bootstrap import Measure
    from frugallm.evaluate.report import ModelFacts, Report

BEFORE = "#8a94a6"
COLORS = ("#0f9d8a", "#e07a3f", "#5b7fd6", "#b85c9e", "#a9912b", "#4ba3c7", "#7d6bd0", "#8a94a6")
_BLOCK = re.compile(r"\.(\d+)\.")


def plots(report: Report) -> list[tuple[str, str, Figure]]:
    """Return ``(title, explanation, figure)`` of every plot there are figures for."""
    found = []
    measured = [m for m in report.models if m.quality is not None and m.file_bytes]
    if len(measured) > 1:
        found.append(
            (
                "What quality costs: perplexity",
                "Perplexity on the evaluation text against weights on disk; bars are 95 % intervals. "
                "Down and to the left is better.",
                _cost(measured, lambda m: m.quality.perplexity, "perplexity"),
            )
        )
    if any(m.quality.kl for m in measured if m.role == "after" and m.quality):
        found.append(
            (
                "What quality costs: divergence",
                "Mean KL divergence from the original, in nats a token; the original lies at zero.",
                _cost(
                    [m for m in measured if m.quality and m.quality.kl],
                    lambda m: m.quality.kl,
                    "KL divergence (nats/token)",
                ),
            )
        )
    shares = [
        (s.step, s.share) for s in report.shares if s.share is not None and math.isfinite(s.share.value)
    ]
    if shares:
        found.append(_shares(shares))
    if report.layers:
        found.append(_layers(report))
    return found


def _figure(x: str, y: str) -> Figure:
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(
        template="none",
        height=380,
        margin={"l": 62, "r": 16, "t": 12, "b": 96},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#7b8494"},
        legend={"orientation": "h", "y": -0.24, "yanchor": "top", "x": 0},
        hoverlabel={"font": {"family": "system-ui, sans-serif"}},
    )
    axis = {
        "gridcolor": "rgba(128,138,155,0.22)",
        "zerolinecolor": "rgba(128,138,155,0.4)",
        "automargin": True,
    }
    figure.update_xaxes(title={"text": x}, **axis)
    figure.update_yaxes(title={"text": y}, **axis)
    return figure


def _cost(models: list[ModelFacts], pick: Any, axis: str) -> Figure:
    """Draw a measure with its interval against size."""
    from plotly.graph_objects import Scatter

    figure = _figure("weights on disk (MB)", axis)
    sizes = [(m.file_bytes or 0) / 1e6 for m in models]
    for position, (model, size) in enumerate(zip(models, sizes, strict=True)):
        found: Measure = pick(model)
        bars = _error_bars([found])
        color = BEFORE if model.role == "before" else COLORS[(position - 1) % len(COLORS)]
        figure.add_trace(
            Scatter(
                x=[size],
                y=[found.value],
                error_y=bars,
                mode="markers",
                cliponaxis=False,
                name=model.name,
                marker={"size": 13, "color": color, "line": {"width": 1, "color": "rgba(128,138,155,0.6)"}},
                hovertemplate=f"%{{x:.1f}} MB<br>{axis} %{{y:.4g}}<extra>{_plain(model.name)}</extra>",
            )
        )
    figure.update_xaxes(range=[0, 1.12 * max(sizes)])
    figure.update_yaxes(rangemode="tozero")
    return figure


def _error_bars(measures: list[Measure]) -> dict[str, Any] | None:
    """Return the intervals of some measures; ``None`` if one of them is unknown."""
    ends = [(m.value, m.low, m.high) for m in measures if m.low is not None and m.high is not None]
    if len(ends) < len(measures):
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, _, high in ends],
        "arrayminus": [value - low for value, low, _ in ends],
        "thickness": 1.5,
        "width": 5,
    }


def _shares(measured: list[tuple[str, Measure]]) -> tuple[str, str, Figure]:
    """Draw how much KL divergence each step takes away, the first step on top."""
    from plotly.graph_objects import Bar

    measures = [share for _, share in measured]
    figure = _figure("KL divergence (nats/token)", "")
    figure.add_trace(
        Bar(
            x=[share.value for share in measures],
            y=[f"{number}. {_plain(step)}" for number, (step, _) in enumerate(measured, 1)],
            orientation="h",
            error_x=_error_bars(measures),
            marker={"color": [COLORS[0] if share.value >= 0 else COLORS[1] for share in measures]},
            width=0.55,
            hovertemplate="%{y}<br>%{x:.4g} nats/token<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_layout(height=110 + 56 * len(measured), margin={"b": 56}, showlegend=False)
    return (
        "What each step gives",
        "KL divergence from the original without the step, less that of the whole recipe; bars are 95 % intervals. "
        "To the left of zero a step does harm.",
        figure,
    )


def _layers(report: Report) -> tuple[str, str, Figure]:
    """Draw the error of every linear against its block, relative to the baseline where there is one."""
    from plotly.graph_objects import Scatter

    relative = all(layer.baseline_error for layer in report.layers)
    figure = _figure("block", "error, relative to the baseline" if relative else "error")
    kinds: dict[str, list[tuple[int, float, str]]] = {}
    for layer in report.layers:
        block = _BLOCK.search(layer.name)
        value = layer.error / layer.baseline_error if relative and layer.baseline_error else layer.error
        kind = layer.name.rpartition(".")[2]
        kinds.setdefault(kind, []).append((int(block[1]) if block else 0, value, layer.name))
    for position, (kind, points) in enumerate(kinds.items()):
        blocks, values, names = (list(column) for column in zip(*points, strict=True))
        figure.add_trace(
            Scatter(
                x=blocks,
                y=values,
                text=[_plain(name) for name in names],
                name=kind,
                mode="lines+markers",
                line={"width": 1.5, "color": COLORS[position % len(COLORS)]},
                marker={"size": 5},
                hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
            )
        )
    if relative:
        figure.add_hline(y=1, line={"dash": "dot", "width": 1.5, "color": BEFORE})
    figure.update_yaxes(type="log")
    return (
        "Where the error lies",
        "Output error of every linear on the calibration text"
        + (
            " over that of the baseline with the same grid and as many zeros; below the dotted line is better."
            if relative
            else "."
        ),
        figure,
    )


def _plain(name: str) -> str:
    """Keep what plotly would read as markup out of its texts."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")
