"""Write the measured table of README.md and draw quality against size, from ``results/*.json`` alone.

``python benchmarks/readme_figures.py`` fills what stands between the markers ``figures:begin`` and ``figures:end`` in
README.md and writes ``results/quality_size.svg``. With ``--check`` it writes nothing and fails if either is stale.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
PLOT = "quality_size.svg"
GIB = 1024**3
NOTHING = (
    "Nothing is recorded in `results/` yet. The [benchmarks](benchmarks/README.md) write it, and `frugal reproduce` "
    "writes what became of every method's claim to `docs/results.md`."
)


@dataclass(frozen=True)
class Row:
    """One way of compressing, as a benchmark found it; ``None`` is not measured."""

    name: str
    evaluation: dict[str, Any]
    weights_bytes: int | None
    seconds: float | None
    peak_bytes: int | None


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """Return a result, if there is one; those of unclean trees lie elsewhere and are never read."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def weight_only(result: dict[str, Any]) -> list[Row]:
    """Return the arms of ``gptq_vs_llmcompressor``, in its order."""
    return [
        Row(
            name,
            arm["evaluation"],
            arm["weights_bytes"],
            arm["seconds"]["median"] if arm["timed"] else None,
            arm["peak_anonymous"]["max"] if arm["timed"] else None,
        )
        for name, arm in result["arms"].items()
    ]


def rounded_inputs(result: dict[str, Any]) -> list[Row]:
    """Return the arms of ``smoothquant_static``, in its order."""
    return [
        Row(f"W8A8 {name}", arm["evaluation"], arm.get("weights_bytes"), None, None)
        for name, arm in result["arms"].items()
    ]


def with_interval(figure: dict[str, Any], digits: int) -> str:
    value = f"{figure['value']:.{digits}f}"
    if figure["low"] is None or figure["high"] is None:
        return value
    return f"{value} ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"


def table(rows: list[Row], base: float) -> list[str]:
    header = [
        "",
        "perplexity (95 %)",
        "KL, nats/token",
        "top-1",
        "weights, MB",
        "whole run, s",
        "peak of the whole run, GiB",
    ]
    lines = [["unquantized", f"{base:.2f}", "0", "100 %", "", "", ""]]
    for row in rows:
        kl, top1 = row.evaluation["kl"], row.evaluation["top1"]
        lines.append(
            [
                row.name,
                with_interval(row.evaluation["perplexity"], 2),
                f"{kl['value']:.4f}",
                f"{100 * top1['value']:.1f} %",
                "" if row.weights_bytes is None else f"{row.weights_bytes / 1e6:.0f}",
                "" if row.seconds is None else f"{row.seconds:.0f}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / GIB:.2f}",
            ]
        )
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]


def engines(result: dict[str, Any]) -> list[str]:
    """Return the arms of ``engine_speed``: medians, tokens a second."""
    header = [
        "engine and model",
        "reading 512 tokens",
        "one answer",
        "eight at once",
        "first token of a process, s",
        "peak, MB",
        "KL, nats/token",
    ]
    lines = []
    for name, arm in result["arms"].items():
        rates = [f"{arm[key]['median']:,.0f}" for key in ("prefill", "decode", "batch")]
        lines.append(
            [name, *rates, f"{arm['start']['median']:.1f}", f"{arm['peak_bytes']['median'] / 1e6:,.0f}"]
        )
        kl = (
            arm["on_engine"]["kl"]
            if "on_engine" in arm
            else arm.get("evaluation", {}).get("kl", {}).get("value")
        )
        lines[-1].append("not known" if kl is None else f"{kl:.4f}")
    chosen, facts = result["setting"], result["facts"]
    about = (
        f"Tokens a second, medians of {chosen['repeats']} runs in turn; {chosen['threads']} threads of "
        f"{facts['machine']['cpu']}; {facts['date'][:10]}, commit {facts['commit'][:10]}. The peak is a process's own "
        "memory; weights that llama.cpp maps are not in it. KL of ours is that of the engine, inputs rounded; of "
        "llama.cpp's files, which `frugal export` wrote, that of their values."
    )
    rows = ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]
    return [*rows, "", about]


#: Results that hold verdicts by target, with the subject that the target's words leave out.
WITH_VERDICTS = {
    "gptq_vs_llmcompressor": "gptq: ",
    "awq_vs_llmcompressor": "awq: ",
    "awq_vs_llmcompressor_tuned": "from 32 calibration windows, the peer tuned: awq: ",
    "hqq_vs_hqq": "hqq ",
    "pruning_vs_llmcompressor": "",
    "gguf_llama_cpp": "GGUF in llama.cpp: ",
    "gguf_families": "GGUF in llama.cpp: ",
    "vllm_handoff": "vLLM, ",
    "quantization": "",
    "file_sizes": "",
    "engine_speed": "engine: ",
}
#: Results that say only whether their one target was met.
WITH_ONE = {
    "memory_limit": "a checkpoint of more than 8 GB goes through in 4 GB of memory",
    "scaling": "time grows linearly with blocks and with calibration tokens",
}
TARGETED = (*WITH_VERDICTS, "smoothquant_static", "llm_int8_vs_w8a8", *WITH_ONE)
MISSED = "**missed**"


def measured(verdict: dict[str, Any]) -> str:
    """Return the figure that decided a verdict."""
    if verdict.get("unit") == "bytes":
        return f"{verdict['value'] / GIB:.2f} GiB"
    if "relative_difference" in verdict:
        return f"{100 * verdict['relative_difference']:.2f} % apart at most ({verdict['worst']})"
    if "worst" in verdict:
        return f"{verdict['value']:.2g} at most ({verdict['worst']})"
    if "different" in verdict:
        return f"all but {', '.join(verdict['different'])}" if verdict["different"] else "all"
    if "of" in verdict:
        return f"{verdict['same']} of {verdict['of']}, transformers with itself {verdict['transformers with itself']}"
    if "vllm" in verdict:
        return f"{verdict['vllm']:.3g} nats apart, transformers from itself {verdict['transformers with itself']:.3g}"
    return f"{verdict['value']:.3f}"


def targets(found: dict[str, dict[str, Any] | None]) -> list[str]:
    """Return a line for every target that was set beforehand, missed ones included."""
    lines = []
    for name, subject in WITH_VERDICTS.items():
        for words, verdict in (found[name] or {}).get("verdicts", {}).items():
            against = f" ({verdict['peer']})" if "peer" in verdict else ""
            lines.append(f"- {subject}{words}{against}: {measured(verdict)}, {_met(verdict['passed'])}")
    if smooth := found["smoothquant_static"]:
        shares = {n: a["gap_closed"] for n, a in smooth["arms"].items() if n.startswith("smoothquant")}
        closed = "; ".join(f"{n}: {100 * s:.1f} %" for n, s in shares.items() if s is not None)
        words = "at least 95 % of the gap between naive static and per-token W8A8 closed"
        lines.append(f"- {words}: {closed}; {_met(smooth['passed'])}")
    if int8 := found["llm_int8_vs_w8a8"]:
        left = "; ".join(
            f"{n}: {100 * a['share_of_loss']['perplexity']:.0f} % in perplexity, {100 * a['share_of_loss']['kl']:.0f} % in KL"
            for n, a in int8["arms"].items()
            if a["share_of_loss"] and a["step"].startswith("llm_int8")
        )
        lines.append(
            f"- at most half of the loss of plain per-token W8A8 left with llm_int8: {left}; {_met(int8['passed'])}"
        )
    for name, words in WITH_ONE.items():
        if one := found[name]:
            lines.append(f"- {words}: {_met(one['passed'])}")
    return lines


def _met(passed: bool) -> str:
    return "met" if passed else MISSED


def in_short(lines: list[str]) -> list[str]:
    """Say how many targets were met, and name the others."""
    missed = [line for line in lines if line.endswith(MISSED)]
    count = f"{len(lines) - len(missed)} of {len(lines)} targets that were set beforehand are met"
    where = "all are in [docs/comparison.md](docs/comparison.md)"
    return [f"{count}; {where}. Missed:" if missed else f"{count}; {where}.", "", *missed]


def setting(result: dict[str, Any]) -> str:
    chosen, facts = result["setting"], result["facts"]
    return (
        f"`{chosen['model']}`; calibration: {chosen['samples']} windows of {chosen['seq_len']} tokens of "
        f"`{chosen['calibration']}`; measured on the first {chosen['windows']} windows of {chosen['window_length']} "
        f"tokens of `{chosen['evaluation']}` with one evaluator for everybody; {chosen['threads']} threads of "
        f"{facts['machine']['cpu']}; {facts['date'][:10]}, commit {facts['commit'][:10]}."
        + (f" {chosen['note']}" if "note" in chosen else "")
    )


def figures(folder: Path) -> tuple[str, str | None]:
    """Return the README's section and the picture, both from the results in ``folder``."""
    found = {name: read(folder, name) for name in TARGETED}
    gptq, smooth = found["gptq_vs_llmcompressor"], found["smoothquant_static"]
    rows = [*(weight_only(gptq) if gptq else []), *(rounded_inputs(smooth) if smooth else [])]
    first = gptq or smooth
    if first is None:
        return NOTHING, None
    base = first["unquantized_perplexity"]
    sized = [row for row in rows if row.weights_bytes is not None]
    lines = [*table(rows, base), "", setting(first), ""]
    if speed := found["engine_speed"]:
        lines += [*engines(speed), ""]
    lines += in_short(targets(found))
    if sized:
        lines += ["", f"![Quality against size](results/{PLOT})"]
    return "\n".join(lines), svg(sized, base) if sized else None


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 420, 70, 520, 30, 360
LABELS, SPACING = RIGHT + 60, 17
HIGHEST = 4  # times the unquantized perplexity; what lies above is drawn at the edge, and said
OURS, PEERS = "#1f6feb", "#8250df"
HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">
<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>
<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#444"/>
<text x="{(LEFT + RIGHT) // 2}" y="{HEIGHT - 18}" text-anchor="middle">weights on disk, MB</text>
<text transform="translate(20 {(TOP + BOTTOM) // 2}) rotate(-90)" text-anchor="middle">perplexity (log scale)</text>"""
TICK_X = f'<text x="{{x:.1f}}" y="{BOTTOM + 18}" text-anchor="middle">{{words}}</text>'
TICK_Y = f'<text x="{LEFT - 8}" y="{{y:.1f}}" text-anchor="end" dominant-baseline="middle">{{words}}</text>'
LEVEL = f"""<path d="M{LEFT} {{y:.1f}}H{RIGHT}" stroke="#888" stroke-dasharray="4 4"/>
<text x="{LEFT + 6}" y="{{above:.1f}}" fill="#555">unquantized {{words}}</text>"""
POINT = f"""<path d="M{{x:.1f}} {{y:.1f}}L{LABELS - 6} {{line:.1f}}" stroke="{{color}}" stroke-opacity="0.25"/>
<circle cx="{{x:.1f}}" cy="{{y:.1f}}" r="4" fill="{{color}}"/>
<text x="{LABELS}" y="{{line:.1f}}" dominant-baseline="middle" fill="{{color}}">{{name}}: {{words}}</text>"""


def spaced(heights: list[float], spacing: float = SPACING, foot: float = BOTTOM) -> list[float]:
    """Move labels, given from the top down, apart to ``spacing``, above ``foot``."""
    lines: list[float] = []
    for y in heights:
        lines.append(max(y, lines[-1] + spacing) if lines else y)
    low = float(foot)
    for i in reversed(range(len(lines))):
        lines[i] = min(lines[i], low)
        low = lines[i] - spacing
    return lines


def svg(rows: list[Row], base: float) -> str:
    """Draw perplexity against the size of the weights, a labeled point per way; ours in another color."""
    points = sorted(
        (
            (r.evaluation["perplexity"]["value"], r.weights_bytes / 1e6, r.name)
            for r in rows
            if r.weights_bytes
        ),
        reverse=True,
    )
    sizes = [size for _, size, _ in points]
    least, most = min(sizes) * 0.97, max(sizes) * 1.03
    highest = min(max(base, points[0][0]) * 1.03, HIGHEST * base)
    bottom, top = math.log(min(base, points[-1][0]) * 0.97), math.log(highest)

    def across(size: float) -> float:
        return LEFT + (size - least) / (most - least) * (RIGHT - LEFT)

    def up(perplexity: float) -> float:
        return BOTTOM - (math.log(min(perplexity, highest)) - bottom) / (top - bottom) * (BOTTOM - TOP)

    parts = [HEAD]
    for share in (0, 0.25, 0.5, 0.75, 1):
        size, perplexity = least + share * (most - least), math.exp(bottom + share * (top - bottom))
        parts.append(TICK_X.format(x=across(size), words=f"{size:.0f}"))
        parts.append(TICK_Y.format(y=up(perplexity), words=f"{perplexity:.1f}"))
    parts.append(LEVEL.format(y=up(base), above=up(base) - 6, words=f"{base:.2f}"))
    lines = spaced([up(perplexity) for perplexity, _, _ in points])
    for (perplexity, size, name), line in zip(points, lines, strict=True):
        color = PEERS if "llm-compressor" in name else OURS
        words, x, y = f"{perplexity:.2f}", across(size), up(perplexity)
        words += " (off the scale)" if perplexity > highest else ""
        parts.append(POINT.format(x=x, y=y, line=line, color=color, name=escape(name), words=words))
    return "\n".join([*parts, "</svg>\n"])


def filled(readme: str, section: str) -> str:
    """Return the README with ``section`` between the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def write_or_check(wanted: dict[Path, str], *, check: bool) -> None:
    """Write the files that are not as wanted, or only say so and exit with 1."""
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        if not check:
            path.write_text(wanted[path], encoding="utf-8")
        print(f"{path.relative_to(ROOT)} {'is stale' if check else 'written'}")
    sys.exit(1 if check and stale else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is stale")
    args = parser.parse_args()
    section, picture = figures(ROOT / "results")
    wanted = {ROOT / "README.md": filled((ROOT / "README.md").read_text(encoding="utf-8"), section)}
    if picture is not None:
        wanted[ROOT / "results" / PLOT] = picture
    write_or_check(wanted, check=args.check)


if __name__ == "__main__":
    main()
