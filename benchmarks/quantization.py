"""The quantization methods against each other: 4, 3 and 2 bits, and rounded inputs.

Every arm is one recipe of ours on the same float32 folder, with the same calibration windows, evaluated as it is stored.
Compared are the recipes that the targets name; the table shows all of them by true bytes, everything counted that is
stored. Static inputs are held against the same weights with a scale a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arms import Arm, benchmark, ours

COLLAPSED = 1e5  # perplexity of a model that knows nothing is that of its vocabulary, about 5e4
HALF, GAP, FACTOR = 0.5, 0.95, 20.0
#: Seconds that compressing may take: a pass that solves or transforms, and one that trains block by block.
SOLVING, RECONSTRUCTING = 300.0, 1200.0
RECONSTRUCTIONS = ("lkd", "zeroquant", "qllm")
G = "group_size=64"


def _weights(bits: int) -> dict[str, Arm]:
    """Return recipes for weights of so many bits in groups of 64, or as their paper wants them."""
    steps = {
        "rtn": [f"rtn:bits={bits},{G}"],
        "gptq": [f"gptq:bits={bits},{G}"],
        "gptaq": [f"gptaq:bits={bits},{G}"],
        "awq": [f"awq:bits={bits},{G}"],
        "hqq": [f"hqq:bits={bits},{G}"],
        "owq": [f"owq:bits={bits}"],
        "spqr": [f"spqr:bits={bits}"],
        "quip": [f"quip:bits={bits}"],
        "rtn lorc": [f"rtn:bits={bits},{G}", "lorc"],
        "gptq lorc": [f"gptq:bits={bits},{G}", "lorc:weighted=true"],
        "awq gptq": [f"awq:bits={bits},{G}", f"gptq:bits={bits},{G}"],
        "rotate gptq": ["rotate", f"gptq:bits={bits},{G}"],
        "rotate gptaq": ["rotate", f"gptaq:bits={bits},{G}"],
        "mixed_bits gptq": [f"mixed_bits:average={bits}", f"gptq:{G}"],
        "mixed_bits gptaq": [f"mixed_bits:average={bits}", f"gptaq:{G}"],
        "mixed_bits gptaq lkd": [f"mixed_bits:average={bits}", f"gptaq:{G}", "lkd"],
        "rotate mixed_bits gptq": ["rotate", f"mixed_bits:average={bits}", f"gptq:{G}"],
        "gptq lkd": [f"gptq:bits={bits},{G}", "lkd"],
    }
    return {f"W{bits} {name}": ours(*recipe, method=name, bits=bits) for name, recipe in steps.items()}


STATIC = {
    "W8A8 static naive": ours("smoothquant:sites=[]"),
    "W8A8 per token naive": ours("smoothquant:sites=[],activation=token"),
    "W8A8 static smoothquant": ours("smoothquant"),
    "W8A8 static os_plus": ours("os_plus"),
    "W8A8 static rptq": ours("rptq"),
    "W8A8 static rptq, 32 clusters": ours("rptq:clusters=32"),
}
FOUR_BIT_INPUTS = {
    "W4A4 per token naive": ours("inputs:bits=4", f"rtn:bits=4,{G}"),
    "W4A4 per token gptq": ours("inputs:bits=4", f"gptq:bits=4,{G}"),
    "W4A4 per token rotate gptq": ours("rotate", "inputs:bits=4", f"gptq:bits=4,{G}"),
    "W4A4 per token os_plus": ours("os_plus:bits=4,input_bits=4,activation=token"),
    "W4A4 per token qllm": ours("qllm"),
}
#: Methods with bits or grids of their own.
OWN = {
    "W4 finequant": ours("finequant"),
    "W4 olive": ours("olive"),
    "W4 obc of keys and values, gptq": ours(
        f"obc:bits=4,{G},only=[*k_proj,*v_proj]", f"gptq:bits=4,{G},only=[*q_proj,*o_proj,*mlp*]"
    ),
    "W4A8 zeroquant": ours("zeroquant"),
    "FP4 and FP8 zeroquant_fp": ours("zeroquant_fp"),
}
ARMS: dict[str, Arm] = {
    **_weights(4),
    **_weights(3),
    **_weights(2),
    **OWN,
    **STATIC,
    **FOUR_BIT_INPUTS,
}


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """Return every recipe of some bits against ``gptq`` alone at these bits."""
    return [(n, g) for n in names if n[0] == "W" and (g := f"{n.split()[0]} gptq") in names and n != g]


def _verdict(value: float, limit: float, *, below: bool = True) -> dict[str, Any]:
    return {"value": value, "limit": limit, "passed": value <= limit if below else value >= limit}


def verdicts(
    runs: dict[str, Any], evaluations: Mapping[str, Any], comparisons: list[dict[str, Any]]
) -> dict[str, Any]:
    """Hold the figures against the targets; a target whose arms did not run is left out."""
    found: dict[str, Any] = {}
    perplexity = {n: evaluations[n].perplexity.value for n in runs}
    kl = {n: evaluations[n].kl.value for n in runs}
    naive, token = "W8A8 static naive", "W8A8 per token naive"
    static = {n: kl[n] for n in STATIC if n in runs and n not in (naive, token)}
    if naive in runs and token in runs and static:
        best = min(static, key=static.__getitem__)
        closed = (kl[naive] - kl[best]) / (kl[naive] - kl[token])
        found[f"W8A8: share of the gap from static to per token closed by {best}"] = _verdict(
            closed, GAP, below=False
        )
    plain, turned = "W4A4 per token naive", "W4A4 per token rotate gptq"
    if plain in runs and turned in runs:
        factor = perplexity[plain] / perplexity[turned]
        found["W4A4: perplexity without rotation, times that with it"] = _verdict(factor, FACTOR, below=False)
    gptq = "W3 gptq"
    at_three = {
        n: kl[n]
        for n in runs
        if n.startswith("W3 ") and gptq in runs and runs[n]["weights_bytes"] <= runs[gptq]["weights_bytes"]
    }
    if len(at_three) > 1:
        best = min(at_three, key=at_three.__getitem__)
        found[f"W3: KL of {best}, in shares of gptq's, at no more bytes"] = _verdict(
            kl[best] / kl[gptq], HALF
        )
    found |= slowest(runs)
    if "W2 quip" in runs:
        found["W2: perplexity of quip does not collapse"] = _verdict(perplexity["W2 quip"], COLLAPSED)
    return found


def slowest(runs: dict[str, Any]) -> dict[str, Any]:
    """Hold the longest pass of each kind against what it may take; other work beside it makes it longer, not shorter."""
    seconds = {n: run["compress_seconds"]["median"] for n, run in runs.items() if run["compress_seconds"]}
    trained = {n for n in seconds if set(n.split()) & set(RECONSTRUCTIONS)}
    found = {}
    for names, words, limit in (
        (seconds.keys() - trained, "solvers and transforms", SOLVING),
        (trained, "reconstructions", RECONSTRUCTING),
    ):
        if names:
            worst = max(names, key=seconds.__getitem__)
            found[f"{words}: seconds of the longest pass, {worst}"] = _verdict(seconds[worst], limit)
    return found


def main() -> None:
    benchmark(
        "quantization",
        ARMS,
        about=__doc__.splitlines()[0],
        more={"group_size": 64},
        pairs=pairs,
        verdicts=verdicts,
    )


if __name__ == "__main__":
    main()
