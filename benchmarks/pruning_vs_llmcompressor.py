"""Wanda and SparseGPT at 50 % zeros against llm-compressor: perplexity, time and memory, both sides in one run.

The peer starts from the same float32 folder and calibrates with the same token windows, in float32 with one window at a
time and in bf16 with batches of 8. Both sides store the pruned weights dense. Ours is held against the peer's best in
perplexity, and in time and memory against that one and against the fastest. Arms without a peer show what the patterns
cost, and pruning together with rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arms import Arm, benchmark, ours, theirs

SPARSITY = 0.5
MOST_TIME, MOST_MEMORY = 0.5, 0.5
FAST = ("--dtype=bfloat16", "--batch-size=8")


def pruned(method: str, pattern: str = "unstructured") -> Arm:
    step = f"{method}:sparsity={SPARSITY},pattern={pattern}"
    return ours(step, method=f"{method} {pattern}", timed=pattern == "unstructured")


def peer(method: str, *options: str, pattern: str = "unstructured") -> Arm:
    mask = "0:0" if pattern == "unstructured" else pattern
    return theirs(
        f"--method={method}",
        f"--sparsity={SPARSITY}",
        f"--mask={mask}",
        *options,
        method=f"{method} {pattern}",
        timed=pattern == "unstructured",
    )


ARMS = {
    "frugallm wanda": pruned("wanda"),
    "llm-compressor wanda": peer("wanda"),
    "llm-compressor wanda, bf16, batches of 8": peer("wanda", *FAST),
    "frugallm sparsegpt": pruned("sparsegpt"),
    "llm-compressor sparsegpt": peer("sparsegpt"),
    "llm-compressor sparsegpt, bf16, batches of 8": peer("sparsegpt", *FAST),
    "frugallm wanda 2:4": pruned("wanda", "2:4"),
    "llm-compressor wanda 2:4": peer("wanda", pattern="2:4"),
    "frugallm sparsegpt 2:4": pruned("sparsegpt", "2:4"),
    "llm-compressor sparsegpt 2:4": peer("sparsegpt", pattern="2:4"),
    "frugallm magnitude": ours(f"magnitude:sparsity={SPARSITY}", method="baseline"),
    "frugallm random": ours(f"random:sparsity={SPARSITY}", method="baseline"),
    "frugallm wanda, then gptq W4": ours("wanda", "gptq:bits=4,group_size=64", method="both"),
    "frugallm sparsegpt, then gptq W4": ours("sparsegpt", "gptq:bits=4,group_size=64", method="both"),
    "frugallm sparsegpt W4 at once": ours("sparsegpt:bits=4,group_size=64", method="both"),
}


def of_method(names: list[str], method: str, *, of_ours: bool) -> list[str]:
    return [n for n in names if ARMS[n].ours == of_ours and ARMS[n].method == method]


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """Return what is compared: ours with the peer's arms of the same method, and everything with the baselines."""
    found = [
        (a, b)
        for a in names
        for b in of_method(names, ARMS[a].method, of_ours=False)
        if ARMS[a].ours and ARMS[a].method != "baseline"
    ]
    chain = ("frugallm sparsegpt", "frugallm wanda", "frugallm magnitude", "frugallm random")
    there = [name for name in chain if name in names]
    return found + [(a, b) for i, a in enumerate(there) for b in there[i + 1 :]]


def verdicts(
    arms: dict[str, Any], evaluations: dict[str, Any], comparisons: list[dict[str, Any]]
) -> dict[str, Any]:
    """Hold the figures against the targets; a target whose arms did not run is left out."""
    found: dict[str, Any] = {}
    for method in ("wanda", "sparsegpt"):
        mine, others = f"frugallm {method}", of_method(list(arms), f"{method} unstructured", of_ours=False)
        if mine not in arms or not others:
            continue
        best = min(others, key=lambda n: evaluations[n].perplexity.value)
        fastest = min(others, key=lambda n: arms[n]["seconds"]["median"])
        pair = next(c for c in comparisons if (c["ours"], c["theirs"]) == (mine, best))
        found[f"{method}: perplexity not above the peer's best"] = {
            "peer": best,
            **pair["perplexity_ratio"],
            "passed": pair["perplexity_ratio"]["value"] <= 1,
        }
        for words, other in (("best", best), ("fastest", fastest)):
            time = arms[mine]["seconds"]["median"] / arms[other]["seconds"]["median"]
            found[f"{method}: time against the peer's {words}"] = {
                "peer": other,
                "value": time,
                "passed": time <= MOST_TIME,
            }
            for key, when in (
                ("peak_anonymous_compressing", "while compressing"),
                ("peak_anonymous", "of the whole run"),
            ):
                memory = arms[mine][key]["max"] / arms[other][key]["max"]
                found[f"{method}: memory {when} against the peer's {words}"] = {
                    "peer": other,
                    "value": memory,
                    "passed": memory <= MOST_MEMORY,
                }
    return found


def zeros_of(folder: Path) -> float:
    """Return the share of zeros in the linears of a folder's blocks, as anybody would load them."""
    import torch

    from frugallm.models import load

    model, _ = load(folder)
    blocks = [
        m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n
    ]
    return sum(int((w == 0).sum()) for w in blocks) / sum(w.numel() for w in blocks)


def main() -> None:
    benchmark(
        "pruning_vs_llmcompressor",
        ARMS,
        about=__doc__.splitlines()[0],
        more={"sparsity": SPARSITY},
        pairs=pairs,
        verdicts=verdicts,
        fact=lambda folder: {"zeros": zeros_of(folder)},
    )


if __name__ == "__main__":
    main()
