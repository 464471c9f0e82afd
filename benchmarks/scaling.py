"""Does time grow linearly with the number of blocks and with the number of calibration tokens?

Synthetic models with the default model's widths; every point is the median of repeated whole ``frugal run``
processes, of which the walk over the blocks is fitted. Writes ``results/scaling.json`` and
``results/scaling.svg``.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness import facts, frugal, measure, table, write_result
from synthetic import Shape, write_checkpoint

STEP = "gptq:bits=4,group_size=64"
LAYERS, SAMPLES, SEQ_LEN = (4, 8, 16, 32), (32, 64, 128, 256), 512
FIXED_SAMPLES, FIXED_LAYERS = 32, 4
LEAST_R_SQUARED = 0.99


def shape(layers: int) -> Shape:
    return Shape(hidden=576, ffn=1536, layers=layers, heads=9, kv_heads=3, head_dim=64, tied=True)


def point(model: Path, out: Path, samples: int, args: argparse.Namespace) -> dict[str, float]:
    command = frugal("run", model, STEP, "--out", out, "--no-evaluate", "--progress=json")
    command += [
        f"--samples={samples}",
        f"--seq-len={SEQ_LEN}",
        f"--threads={args.threads}",
        f"--text={args.text}",
    ]
    measured = measure(command, threads=args.threads)
    shutil.rmtree(out)
    return {"process_seconds": measured.seconds, "walk_seconds": measured.stage_seconds("compressing")}


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Fit ``y = intercept + slope x`` by least squares; ``r_squared`` is the share of variance explained."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (intercept + slope * np.asarray(x))
    total = np.asarray(y) - np.mean(y)
    r_squared = 1 - float(residual @ residual) / float(total @ total)
    return {"slope": float(slope), "intercept": float(intercept), "r_squared": r_squared}


def series(name: str, unit: str, points: dict[int, list[dict[str, float]]]) -> dict[str, Any]:
    x = list(points)
    y = [statistics.median(run["walk_seconds"] for run in runs) for runs in points.values()]
    return {"name": name, "unit": unit, "x": x, "seconds": y, "fit": fit(x, y), "runs": list(points.values())}


def collect(work: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all points in turn, ``--repeats`` times, so that a slow minute does not hit one point alone."""
    models = {layers: work / f"model-{layers}" for layers in {*LAYERS, FIXED_LAYERS}}
    for layers, folder in models.items():
        write_checkpoint(folder, shape(layers))
    blocks: dict[int, list[dict[str, float]]] = {n: [] for n in LAYERS}
    tokens: dict[int, list[dict[str, float]]] = {n * SEQ_LEN: [] for n in SAMPLES}
    for _ in range(args.repeats):
        for layers in LAYERS:
            blocks[layers].append(point(models[layers], work / "out", FIXED_SAMPLES, args))
        for samples in SAMPLES:
            tokens[samples * SEQ_LEN].append(point(models[FIXED_LAYERS], work / "out", samples, args))
    return [series("blocks", "blocks", blocks), series("calibration tokens", "tokens", tokens)]


WIDTH, HEIGHT, MARGIN, TOP, BOTTOM = 420, 300, 60, 40, 250


def svg(panels: list[dict[str, Any]]) -> str:
    """Draw one panel per series: points, fitted line, and how well it fits."""
    size = f"0 0 {WIDTH * len(panels)} {HEIGHT}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif" font-size="12">'
    )
    ground = f'<rect width="{WIDTH * len(panels)}" height="{HEIGHT}" fill="white"/>'
    drawn = [part for number, panel in enumerate(panels) for part in _panel(panel, number * WIDTH + MARGIN)]
    return "\n".join([head, ground, *drawn, "</svg>\n"])


def _panel(panel: dict[str, Any], left: int) -> list[str]:
    right, line = left + WIDTH - MARGIN - 20, panel["fit"]
    across = (right - left) / (max(panel["x"]) * 1.05)
    up = (BOTTOM - TOP) / (max(panel["seconds"]) * 1.1)
    middle = (left + right) / 2

    def text(x: float, y: float, words: str) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{words}</text>'

    start, end = (BOTTOM - (line["intercept"] + line["slope"] * x) * up for x in (0, max(panel["x"])))
    far = left + max(panel["x"]) * across
    parts = [
        f'<path d="M{left} {TOP}V{BOTTOM}H{right}" fill="none" stroke="#444"/>',
        f'<path d="M{left} {start:.1f}L{far:.1f} {end:.1f}" stroke="#1f6feb"/>',
        text(middle, BOTTOM + 38, panel["name"]),
        text(middle, 22, f"seconds of the walk; R² of the line {line['r_squared']:.4f}"),
    ]
    for x, y in zip(panel["x"], panel["seconds"], strict=True):
        cx, cy = left + x * across, BOTTOM - y * up
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="#d1242f"/>')
        parts += [text(cx, BOTTOM + 18, f"{x:,}"), text(cx, cy - 9, f"{y:.1f}")]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="calibration text with at least 131,072 tokens"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    about = facts()
    with tempfile.TemporaryDirectory(prefix="frugallm-scaling-") as work:
        panels = collect(Path(work), args)
    content = {
        "benchmark": "scaling",
        "facts": about,
        "setting": {
            "step": STEP,
            "model": vars(shape(0)) | {"layers": "as given"},
            "samples_for_blocks": FIXED_SAMPLES,
            "layers_for_tokens": FIXED_LAYERS,
            "seq_len": SEQ_LEN,
            "threads": args.threads,
            "repeats": args.repeats,
        },
        "series": panels,
        "passed": all(panel["fit"]["r_squared"] >= LEAST_R_SQUARED for panel in panels),
    }
    path = write_result("scaling", content)
    path.with_suffix(".svg").write_text(svg(panels))
    for panel in panels:
        rows = [[f"{x:,}", f"{y:.1f}"] for x, y in zip(panel["x"], panel["seconds"], strict=True)]
        print(table([panel["name"], "walk (s)"], rows))
        print(f"\nR² of a straight line: {panel['fit']['r_squared']:.4f}\n")
    print(f"Written to {path}. {'PASS' if content['passed'] else 'FAIL'}")
    raise SystemExit(0 if content["passed"] else 1)


if __name__ == "__main__":
    main()
