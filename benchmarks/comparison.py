"""Write the table and the picture of everything that was measured: divergence and perplexity against true bytes.

``python benchmarks/comparison.py`` writes ``docs/comparison.md`` and ``results/kl_size.svg`` from ``results/*.json``
alone. With ``--check`` it writes nothing and fails if either is stale. Benchmarks may have looked at different numbers
of windows; all figures here are over the leading windows that every one of them has.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from readme_figures import ROOT, TARGETED, read, spaced, targets, write_or_check

PAGE, PLOT = "comparison.md", "kl_size.svg"
OURS, LLM_COMPRESSOR, HQQ, GGUF = "FrugalLM", "llm-compressor", "hqq", "GGUF"
LLAMA_CPP, AUTO_ROUND = "llama.cpp", "AutoRound"
COLORS = {OURS: "#1f6feb", LLM_COMPRESSOR: "#8250df", HQQ: "#bf8700", GGUF: "#1a7f37"}
COLORS |= {LLAMA_CPP: "#cf222e", AUTO_ROUND: "#57606a"}
#: The first word of a way to who made it.
SIDES = {"frugallm": OURS, "llm-compressor": LLM_COMPRESSOR, "hqq": HQQ, "gguf": GGUF}
SIDES |= {"llama.cpp": LLAMA_CPP, "autoround": AUTO_ROUND}
#: Benchmark to what stands before the names of its arms.
BENCHMARKS = {
    "gptq_vs_llmcompressor": "",
    "awq_vs_llmcompressor": "",
    "hqq_vs_hqq": "",
    "smoothquant_static": "frugallm W8A8 ",
    "llm_int8_vs_w8a8": "frugallm ",
    "pruning_vs_llmcompressor": "",
    "gguf_llama_cpp": "gguf ",
    "quantization": "frugallm ",
    "file_sizes": "",
}
#: Zeros are stored dense, so the bytes say nothing.
UNSIZED = ("pruning_vs_llmcompressor",)


@dataclass(frozen=True)
class Row:
    """One folder or file; ``megabytes`` is ``None`` where the size says nothing about the way."""

    name: str
    side: str
    megabytes: float | None
    perplexity: float
    kl: float


def side_of(name: str) -> str:
    """Return who made a folder, from the name of its arm."""
    if (word := name.split()[0]) in SIDES:
        return SIDES[word]
    raise ValueError(f"nobody is known who made '{name}'")


def row(name: str, arm: dict[str, Any], windows: int, sized: bool) -> Row:
    evaluation = arm["evaluation"]
    size = arm.get("weights_bytes", arm.get("bytes")) if sized else None
    return Row(
        name,
        side_of(name),
        None if size is None else size / 1e6,
        math.exp(math.fsum(evaluation["nll_per_window"][:windows]) / windows),
        math.fsum(evaluation["kl_per_window"][:windows]) / windows,
    )


def rows(found: dict[str, dict[str, Any]], windows: int) -> list[Row]:
    """Return a row per way, the closest to the original first; an arm that two benchmarks share is taken once."""
    made: dict[str, Row] = {}
    for benchmark, result in found.items():
        for arm, content in result["arms"].items():
            name = f"{BENCHMARKS[benchmark]}{arm}"
            made.setdefault(name, row(name, content, windows, benchmark not in UNSIZED))
    return sorted(made.values(), key=lambda r: r.kl)


def frontier(points: list[Row]) -> set[str]:
    """Return the names of those that nothing smaller or as small, to a tenth of a megabyte, comes closer than."""
    sized = [(round(p.megabytes, 1), p.kl, p) for p in points if p.megabytes is not None]
    best, found = math.inf, set()
    for _, _, point in sorted(sized, key=lambda one: one[:2]):
        if point.kl < best:
            best = point.kl
            found.add(point.name)
    return found


GGUF_ROWS = "`gguf` rows are files written by `frugal export`; what llama.cpp computes from them stands under the targets."
SIZED_ROWS = (
    "`llama.cpp` rows are files that llama.cpp itself quantized, read by our evaluator with unrounded inputs; files for "
    "llama.cpp hold the vocabulary as well (1.8 MB)."
)


def page(
    points: list[Row], base: float, found: dict[str, dict[str, Any]], windows: int, held: list[str]
) -> str:
    """Return the Markdown page; ``held`` are the lines about targets."""
    setting = next(iter(found.values()))["setting"]
    best = frontier(points)
    lines = [
        "# Everything measured, side by side",
        "",
        "<!-- made by 'python benchmarks/comparison.py' from results/ -->",
        "",
        f"`{setting['model']}`, the first {windows} windows of {setting['window_length']} tokens of "
        f"`{setting['evaluation']}`, one evaluator for everybody; unquantized perplexity {base:.2f}. Where a way "
        f"needs calibration: windows and tokens of `{setting['calibration']}` as its benchmark took them.",
        "",
        "Bytes are those of the weight files, embedding and norms included. What llm-compressor made in float32 has its",
        "embedding and scales in float32; its rows say so by their size. Pruned weights are stored dense: their rows have",
        "no size. **Bold**: nothing that is as small or smaller comes closer to the original.",
        *([GGUF_ROWS] if "gguf_llama_cpp" in found else []),
        *([SIZED_ROWS] if "file_sizes" in found else []),
        "",
        f"![Divergence against bytes](../results/{PLOT})",
        "",
        "| # | way | MB | KL, nats/token | perplexity | calibration | benchmark's result |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    origin = {f"{BENCHMARKS[b]}{arm}": b for b in reversed(found) for arm in found[b]["arms"]}
    for number, one in enumerate(points, 1):
        name = f"**{one.name}**" if one.name in best else one.name
        size = "" if one.megabytes is None else f"{one.megabytes:.1f}"
        benchmark = origin[one.name]
        taken = found[benchmark]["setting"]
        cells = [
            name,
            size,
            f"{one.kl:.4f}",
            f"{one.perplexity:.2f}",
            f"{taken['samples']} × {taken['seq_len']}",
        ]
        cells.append(f"[{benchmark}](../results/{benchmark}.json)")
        lines.append(f"| {number} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Targets",
        "",
        "Set before they were measured (how far apart log-probabilities in vLLM may be: after a first look); those",
        "that were missed stay.",
        "",
        *held,
    ]
    if alone := found.get("file_sizes", {}).get("without_peer"):
        lines += ["", f"No peer of so many bytes or up to 3 % more: {'; '.join(alone)}."]
    return "\n".join([*lines, ""])


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 520, 70, 880, 40, 460
HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">
<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>
<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#444"/>
<text x="{(LEFT + RIGHT) // 2}" y="{HEIGHT - 18}" text-anchor="middle">weights on disk, MB</text>
<text transform="translate(20 {(TOP + BOTTOM) // 2}) rotate(-90)" text-anchor="middle">KL, nats/token (log scale)</text>"""
TICK_X = f"""<path d="M{{x:.1f}} {TOP}V{BOTTOM}" stroke="#eee"/>
<text x="{{x:.1f}}" y="{BOTTOM + 18}" text-anchor="middle">{{words}}</text>"""
TICK_Y = f"""<path d="M{LEFT} {{y:.1f}}H{RIGHT}" stroke="#eee"/>
<text x="{LEFT - 8}" y="{{y:.1f}}" text-anchor="end" dominant-baseline="middle">{{words}}</text>"""
POINT = """<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"><title>{name}</title></circle>
<path d="M{x:.1f} {y:.1f}L{after:.1f} {line:.1f}" stroke="{color}" stroke-opacity="0.3"/>
<text x="{after:.1f}" y="{line:.1f}" dominant-baseline="middle" font-size="10" fill="{color}">{number}</text>"""
LEGEND = """<circle cx="{x}" cy="20" r="4" fill="{color}"/><text x="{after}" y="24">{name}</text>"""
LABEL_SPACING, COLUMN = 10, 14  # points no farther apart are a column; labels are to its right
MOST_DEVIATION = 8.0  # nats; what is farther is drawn at the edge


def svg(points: list[Row]) -> str:
    """Draw divergence against size; the numbers are those of the table, a line joins the frontier."""
    numbered = [(n, p) for n, p in enumerate(points, 1) if p.megabytes is not None and p.kl > 0]
    sizes = [p.megabytes for _, p in numbered]
    least, most = min(sizes) * 0.95, max(sizes) * 1.02
    low = math.floor(math.log10(min(p.kl for _, p in numbered)))
    high = math.log10(MOST_DEVIATION)

    def across(size: float) -> float:
        return LEFT + math.log(size / least) / math.log(most / least) * (RIGHT - LEFT)

    def up(kl: float) -> float:
        return BOTTOM - (math.log10(min(kl, MOST_DEVIATION)) - low) / (high - low) * (BOTTOM - TOP)

    parts = [HEAD]
    parts += [
        TICK_X.format(x=across(s), words=s)
        for s in (60, 80, 100, 120, 160, 200, 300, 500)
        if least < s < most
    ]
    parts += [TICK_Y.format(y=up(10.0**e), words=f"{10.0**e:g}") for e in range(low, math.floor(high) + 1)]
    best = frontier(points)
    corner = sorted((across(p.megabytes), up(p.kl)) for _, p in numbered if p.name in best)
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in corner[1:])
    parts.append(f'<path d="M{corner[0][0]:.1f} {corner[0][1]:.1f}{steps}" fill="none" stroke="#999"/>')
    columns: list[list[tuple[int, Row]]] = []
    for number, p in sorted(numbered, key=lambda one: one[1].megabytes):
        if not columns or across(p.megabytes) - across(columns[-1][-1][1].megabytes) > COLUMN:
            columns.append([])
        columns[-1].append((number, p))
    for column in columns:
        after = across(column[-1][1].megabytes) + 9
        column.sort(key=lambda one: up(one[1].kl))
        lines = spaced([up(p.kl) for _, p in column], LABEL_SPACING, BOTTOM)
        for (number, p), line in zip(column, lines, strict=True):
            x, look = across(p.megabytes), {"color": COLORS[p.side], "name": escape(p.name), "number": number}
            parts.append(POINT.format(x=x, y=up(p.kl), after=after, line=line, **look))
    sides = [side for side in COLORS if any(p.side == side for _, p in numbered)]
    for place, side in enumerate(sides):
        x = LEFT + 20 + min(160, (RIGHT - LEFT) // len(sides)) * place
        parts.append(LEGEND.format(x=x, after=x + 10, color=COLORS[side], name=side))
    return "\n".join([*parts, "</svg>\n"])


def made(folder: Path) -> tuple[str, str] | None:
    """Return page and picture from the results in ``folder``; ``None`` if there are none."""
    found = {name: result for name in BENCHMARKS if (result := read(folder, name))}
    if not found:
        return None
    evaluations = [arm["evaluation"] for result in found.values() for arm in result["arms"].values()]
    windows = min(e["windows"] for e in evaluations)
    base = math.exp(math.fsum(evaluations[0]["reference_nll_per_window"][:windows]) / windows)
    points = rows(found, windows)
    held = targets({name: read(folder, name) for name in TARGETED})
    return page(points, base, found, windows, held), svg(points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is stale")
    args = parser.parse_args()
    written = made(ROOT / "results")
    if written is None:
        raise SystemExit("results/ holds nothing to compare; run the benchmarks first")
    wanted = dict(zip((ROOT / "docs" / PAGE, ROOT / "results" / PLOT), written, strict=True))
    write_or_check(wanted, check=args.check)


if __name__ == "__main__":
    main()
