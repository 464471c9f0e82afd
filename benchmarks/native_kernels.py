"""How near do the kernels come to the limits of the machine, and how much faster are they than torch's own?

Every timed case of ``frugallm.kernels.cases``, on every path the processor has: gigabytes a second of weights where one row
is computed, operations a second where many are, each as a share of what was measured in the same minutes: reading memory,
and torch's product of int8 and of bf16. Writes ``results/native_kernels.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from frugallm.kernels import library, operations
from frugallm.kernels.cases import ATTENTIONS, LINEARS, TIMED_ROWS, AttentionCase, LinearCase
from frugallm.kernels.limits import limits, seconds
from harness import facts, table, write_result

#: Weights that a case goes through in turn, so that none is found in the processor's cache.
COLD_BYTES = 128 << 20


def cycle(items: list[Any]) -> Callable[[], Any]:
    """Return a function that gives the items in turn."""
    state = {"next": 0}

    def give() -> Any:
        state["next"] = (state["next"] + 1) % len(items)
        return items[state["next"]]

    return give


def time_linear(case: LinearCase, path: str, threads: int, limit: dict[str, float]) -> list[dict[str, Any]]:
    weight = case.weight()
    copies = -(-COLD_BYTES // weight.nbytes)
    packed = cycle([case.weight() for _ in range(copies)])
    dense = weight.dequantize().bfloat16()
    own = cycle([dense.clone() for _ in range(-(-COLD_BYTES // dense.nbytes))])
    rows = []
    for count in TIMED_ROWS if case.rows < 10000 else TIMED_ROWS[:2]:
        x, half = case.inputs(count), case.inputs(count).bfloat16()
        ours = seconds(lambda x=x: operations.linear(x, packed(), path, threads))
        torchs = seconds(lambda half=half: linear(half, own()))
        work = 2 * count * case.rows * case.width
        peak = limit["int8" if case.kind.startswith("int") else "bf16"]
        rows.append(
            {
                "case": case.name,
                "path": path,
                "rows": count,
                "seconds": ours,
                "torch_bf16_seconds": torchs,
                "bytes_per_second": weight.nbytes / ours,
                "operations_per_second": work / ours,
                "share": weight.nbytes / ours / limit["memory"] if count == 1 else work / ours / peak,
            }
        )
    return rows


def time_attention(case: AttentionCase, path: str, limit: dict[str, float]) -> dict[str, Any]:
    queries, keys, values, positions, table_ = case.tensors()
    whole = seconds(
        lambda: operations.attend(queries, keys, values, positions, 0.125, 0, path, table_)
    )  # writes the cache as well
    cached = [t.bfloat16()[None, None] for t in (queries, keys, values)]
    mask = torch.arange(case.length)[None] <= positions[:, None]
    own = seconds(lambda: scaled_dot_product_attention(*cached, attn_mask=mask))
    seen = float((positions + 1).sum())
    work = 4 * seen * case.head
    return {
        "case": case.name,
        "path": path,
        "rows": case.queries,
        "seconds": whole,
        "torch_bf16_seconds": own,
        "bytes_per_second": 4 * case.length * case.head / whole,
        "operations_per_second": work / whole,
        "share": work / whole / limit["bf16"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--paths", nargs="*", default=library.usable_paths())
    parser.add_argument("--only", default="", help="a word of the cases' names")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limit = limits()
    rows: list[dict[str, Any]] = []
    for path in args.paths:
        for case in LINEARS:
            if case.timed and args.only in case.name:
                rows += time_linear(case, path, args.threads, limit)
        rows += [time_attention(c, path, limit) for c in ATTENTIONS if c.timed and args.only in c.name]
    write_result(
        "native_kernels", {"facts": facts(), "threads": args.threads, "limits": limit, "cases": rows}
    )
    print({name: f"{value / 1e9:.1f} G/s" for name, value in limit.items()})
    header = ("case", "path", "rows", "GB/s", "GOP/s", "share of the limit", "torch bf16 / ours")
    print(
        table(
            header,
            [
                (
                    *(r["case"], r["path"], r["rows"], f"{r['bytes_per_second'] / 1e9:.1f}"),
                    f"{r['operations_per_second'] / 1e9:.0f}",
                    f"{100 * r['share']:.0f} %",
                    f"{r['torch_bf16_seconds'] / r['seconds']:.2f}",
                )
                for r in rows
            ],
        )
    )


if __name__ == "__main__":
    main()
