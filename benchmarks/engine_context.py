"""Decode against context: the time of a token behind prompts of several lengths, a line through it, and a picture."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np


def by_context(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the time of a token behind prompts of several lengths, and how far it is from a straight line."""
    lengths = [int(length) for length in runs[0]["context"]]
    rates = [statistics.median(run["context"][str(length)] for run in runs) for length in lengths]
    times = 1 / np.asarray(rates)
    line = np.polyfit(lengths, times, 1)
    return {
        "context": lengths,
        "tokens_per_second": rates,
        "runs": [run["context"] for run in runs],
        "seconds_per_token": {"at_0": float(line[1]), "more_per_token_of_context": float(line[0])},
        "largest_distance_from_line": float(np.abs(times / np.polyval(line, lengths) - 1).max()),
    }


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 70, 690, 50, 330
COLORS = ("#1f6feb", "#cf222e")


def svg(found: dict[str, Any]) -> str:
    """Draw the milliseconds of a token against the context."""
    times = {name: [1e3 / rate for rate in one["tokens_per_second"]] for name, one in found.items()}
    across = (RIGHT - LEFT) / max(max(one["context"]) for one in found.values())
    up = (BOTTOM - TOP) / (1.1 * max(map(max, times.values())))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#444"/>',
        f'<text x="{(LEFT + RIGHT) // 2}" y="{HEIGHT - 8}" text-anchor="middle">tokens of context</text>',
        f'<text x="{LEFT}" y="20">milliseconds a token</text>',
    ]
    for place, (name, one) in enumerate(found.items()):
        color, points = COLORS[place % len(COLORS)], list(zip(one["context"], times[name], strict=True))
        spots = [(LEFT + x * across, BOTTOM - y * up, x, y) for x, y in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in spots)
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}"/>')
        parts.append(f'<text x="{LEFT + 200 + 230 * place}" y="20" fill="{color}">{name}</text>')
        for x, y, length, milliseconds in spots:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
            parts.append(f'<text x="{x:.1f}" y="{y - 7:.1f}" text-anchor="end">{milliseconds:.1f}</text>')
            if place == 0:
                parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{length:,}</text>')
    return "\n".join([*parts, "</svg>\n"])
