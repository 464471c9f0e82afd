"""GPTQ and rounding against llm-compressor: perplexity, time and memory, both sides in one run.

The peer starts from the same float32 folder and calibrates with the same token windows. It is given every
setting it offers for this job (act-order, three observers, bf16 and batches for speed), and ours is held
against its best. Each arm is a whole process; timed arms run several times, ours and theirs in turn.
"""

from __future__ import annotations

from typing import Any

from arms import benchmark, ours, theirs
from harness import GIB

MOST_TIME, MOST_MEMORY, MOST_OF_ROUNDING_W3 = 0.40, GIB, 0.75


ARMS = {
    "frugallm gptq W4": ours("gptq:bits=4,group_size=64", timed=True),
    "llm-compressor gptq W4": theirs(timed=True),
    "llm-compressor gptq W4, bf16, batches of 8": theirs("--dtype=bfloat16", "--batch-size=8", timed=True),
    "llm-compressor gptq W4, no act-order": theirs("--actorder=none"),
    "llm-compressor gptq W4, mse": theirs("--observer=memoryless_mse"),
    "llm-compressor gptq W4, imatrix": theirs("--observer=imatrix_mse"),
    "frugallm gptq W4, plain range": ours("gptq:bits=4,group_size=64,search=minmax"),
    "frugallm rtn W4": ours("rtn:bits=4,group_size=64", method="rtn"),
    "llm-compressor rtn W4": theirs("--method=rtn", method="rtn"),
    "frugallm gptq W3": ours("gptq:bits=3,group_size=64", bits=3),
    "llm-compressor gptq W3, imatrix": theirs("--bits=3", "--observer=imatrix_mse", bits=3),
    "frugallm rtn W3": ours("rtn:bits=3,group_size=64", method="rtn", bits=3),
}


def verdicts(
    arms: dict[str, Any], evaluations: dict[str, Any], comparisons: list[dict[str, Any]]
) -> dict[str, Any]:
    """Hold the figures against the targets; a target whose arms did not run is left out."""
    found: dict[str, Any] = {}
    main = "frugallm gptq W4"
    peers_w4 = [n for n in arms if not ARMS[n].ours and ARMS[n].method == "gptq" and ARMS[n].bits == 4]
    if main in arms and any(ARMS[n].timed for n in peers_w4):
        best = min(peers_w4, key=lambda n: evaluations[n].perplexity.value)
        pair = next(c for c in comparisons if (c["ours"], c["theirs"]) == (main, best))
        high = pair["perplexity_ratio"]["high"]
        found["perplexity below the peer's best"] = {
            "peer": best,
            **pair["perplexity_ratio"],
            "passed": high is not None and high < 1,
        }
        timed = [n for n in peers_w4 if ARMS[n].timed]
        for words, peer in (
            ("time against the peer's defaults", timed[0]),
            ("time against the peer's fastest", min(timed, key=lambda n: arms[n]["seconds"]["median"])),
        ):
            share = arms[main]["seconds"]["median"] / arms[peer]["seconds"]["median"]
            found[words] = {"peer": peer, "value": share, "passed": share <= MOST_TIME}
        peak = arms[main]["peak_anonymous_compressing"]["max"]
        found["at most 1 GiB while compressing"] = {
            "value": peak,
            "unit": "bytes",
            "passed": peak <= MOST_MEMORY,
        }
    w3, base = "frugallm gptq W3", "frugallm rtn W3"
    if w3 in arms and base in arms:
        share = evaluations[w3].perplexity.value / evaluations[base].perplexity.value
        found["W3 perplexity at most 75 % of rounding's"] = {
            "value": share,
            "passed": share <= MOST_OF_ROUNDING_W3,
        }
    return found


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """Return ours against the peer's and against rounding, at the same bits."""
    return [
        (a, b)
        for a in names
        for b in names
        if a != b
        and ARMS[a].ours
        and ARMS[a].bits == ARMS[b].bits
        and (not ARMS[b].ours or ARMS[b].method == "rtn")
    ]


def main() -> None:
    benchmark(
        "gptq_vs_llmcompressor",
        ARMS,
        about=__doc__.splitlines()[0],
        more={"group_size": 64, "symmetric": True},
        pairs=pairs,
        verdicts=verdicts,
    )


if __name__ == "__main__":
    main()
