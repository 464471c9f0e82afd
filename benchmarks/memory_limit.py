"""A model larger than memory: compress a checkpoint of more than 8 GB under a hard memory limit of 4 GB.

The checkpoint (random, seeded, bf16) is written on the spot and removed afterwards. The limit is that of a memory
control group, as on a machine with no more memory than that: it holds for the process, its children and the pages of
files they have in memory, which the system drops when it needs them.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from harness import facts, frugal, measure, table, write_result
from synthetic import VOCABULARY, Shape, write_checkpoint

GB = 10**9
# Widths of a 3-billion-parameter Llama, and as many blocks as make more than 8 GB in bf16.
SHAPE = Shape(hidden=3072, ffn=8192, layers=40, heads=24, kv_heads=8, head_dim=128)
SAMPLES, SEQ_LEN = 4, 128
# At these widths gptq takes half a minute a block, so that its memory is also shown in a few blocks of the same run.
FEW = "*.layers.[0-5].*"
STEPS = {
    "rtn": ("rtn:bits=4",),
    "gptq": ("gptq:bits=4",),
    "gptq in six blocks": (f"gptq:bits=4,only=[{FEW}]", f"rtn:bits=4,skip=[{FEW}]"),
}
# What gptq declares beyond the block: bytes per entry of the largest second moment. rtn declares nothing.
WORKSPACE_BYTES_PER_ENTRY = {"rtn": 0, "gptq": 18, "gptq in six blocks": 18}


def allowance(method: str, shape: Shape) -> dict[str, int]:
    """Return what the process may hold, in bytes: block, declared workspace, hidden states, and 1 GB."""
    parts = {
        # float32 values to compute with, and the 16-bit copy that runs.
        "block": shape.block_parameters * (4 + 2),
        "workspace": WORKSPACE_BYTES_PER_ENTRY[method] * max(shape.hidden, shape.ffn) ** 2,
        "hidden_states": 0 if method == "rtn" else SAMPLES * SEQ_LEN * (4 * shape.hidden + 2 * shape.ffn),
        "everything_else": GB,
    }
    return {**parts, "total": sum(parts.values())}


def run(method: str, model: Path, out: Path, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Compress the checkpoint under the limit and hold the peak against the allowance."""
    command = frugal("run", model, *STEPS[method], "--out", out, "--no-evaluate", "--progress=json")
    command += [f"--samples={SAMPLES}", f"--seq-len={SEQ_LEN}", f"--threads={args.threads}"]
    limit = int(args.limit_gb * GB)
    measured = measure(command, threads=args.threads, memory_limit=limit, check=False)
    allowed = allowance(method, shape)
    finished = measured.status == 0 and (out / "config.json").exists()
    written = sum(file.stat().st_size for file in out.glob("*")) if finished else 0
    shutil.rmtree(out, ignore_errors=True)
    return {
        "step": " ".join(STEPS[method]),
        "status": measured.status,
        "seconds": round(measured.seconds, 1),
        "limit_bytes": limit,
        "peak_anonymous_bytes": measured.peak_main_anonymous_bytes,
        "peak_anonymous_bytes_with_children": measured.peak_anonymous_bytes,
        "peak_resident_bytes": measured.peak_resident_bytes,
        "peak_anonymous_bytes_by_stage": {s.name: s.peak_anonymous_bytes for s in measured.stages},
        "allowance_bytes": allowed,
        "output_bytes": written,
        "passed": finished and measured.peak_anonymous_bytes <= min(limit, allowed["total"]),
        "log": "" if finished else measured.log[-2000:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=sorted(STEPS), default=["rtn", "gptq"])
    parser.add_argument("--layers", type=int, default=SHAPE.layers, help="fewer for a quick look")
    parser.add_argument("--limit-gb", type=float, default=4.0, help="in units of 10^9 bytes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder with room for the checkpoint and one result")
    args = parser.parse_args()
    about = facts()
    shape = Shape(**{**vars(SHAPE), "layers": args.layers})
    with tempfile.TemporaryDirectory(prefix="frugallm-memory-", dir=args.work) as work:
        model = Path(work) / "model"
        size = write_checkpoint(model, shape)
        runs = {name: run(name, model, Path(work) / f"out-{name}", shape, args) for name in args.methods}
    content = {
        "benchmark": "memory_limit",
        "facts": about,
        "setting": {
            "model": {**vars(shape), "vocabulary": VOCABULARY, "bytes": size, "seed": 0},
            "limit": "memory control group",
            "samples": SAMPLES,
            "seq_len": SEQ_LEN,
            "threads": args.threads,
        },
        "runs": runs,
        "passed": all(r["passed"] for r in runs.values()),
    }
    path = write_result("memory_limit", content)
    print(f"Checkpoint: {size / GB:.2f} GB. Limit: {args.limit_gb:g} GB of memory. Written to {path}.\n")
    header = ["step", "peak anonymous memory (GB)", "allowance (GB)", "time (s)", "result"]
    rows = [
        [
            r["step"],
            f"{r['peak_anonymous_bytes_with_children'] / GB:.2f}",
            f"{r['allowance_bytes']['total'] / GB:.2f}",
            f"{r['seconds']:.0f}",
            "PASS" if r["passed"] else f"FAIL (status {r['status']})",
        ]
        for r in runs.values()
    ]
    print(table(header, rows))
    raise SystemExit(0 if content["passed"] else 1)


if __name__ == "__main__":
    main()
