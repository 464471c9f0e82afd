"""AWQ against llm-compressor: perplexity, time and memory, both sides in one run.

The peer starts from the same float32 folder and calibrates with the same token windows. Symmetric arms are held against
symmetric ones, and asymmetric against asymmetric: the bytes are then the same. The peer gets its default (weights' own
size in the scale), its search over both scales, its range searches, and bf16 with batches for speed; ours is held
against the best of these in perplexity. Our plain arms say what scales and ranges do by themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from arms import Arm, benchmark, ours, theirs

if TYPE_CHECKING:
    from frugallm.models.checkpoint import Checkpoint

MOST_TIME = 0.5
SYMMETRIC, ASYMMETRIC = "frugallm awq W4", "frugallm awq W4 asymmetric"


def _ours(options: str = "", bits: int = 4, **more: Any) -> Arm:
    return ours(f"awq:bits={bits},group_size=64{options}", method="awq", bits=bits, **more)


def _theirs(*options: str, **more: Any) -> Arm:
    return theirs("--method=awq", *options, method="awq", **more)


ARMS = {
    SYMMETRIC: _ours(timed=True),
    "llm-compressor awq W4": _theirs(timed=True),
    "llm-compressor awq W4, bf16, batches of 8": _theirs("--dtype=bfloat16", "--batch-size=8", timed=True),
    "llm-compressor awq W4, both scales": _theirs("--duo-scaling=both"),
    "llm-compressor awq W4, mse": _theirs("--observer=memoryless_mse"),
    "llm-compressor awq W4, mse and both scales, bf16, batches of 8": _theirs(
        "--observer=memoryless_mse", "--duo-scaling=both", "--dtype=bfloat16", "--batch-size=8"
    ),
    "llm-compressor awq W4, imatrix": _theirs("--observer=imatrix_mse"),
    ASYMMETRIC: _ours(",symmetric=false"),
    "llm-compressor awq W4 asymmetric": _theirs("--asymmetric"),
    "llm-compressor awq W4 asymmetric, both scales": _theirs("--asymmetric", "--duo-scaling=both"),
    "frugallm awq W4, scales alone": _ours(",clip=false"),
    "frugallm awq W4, ranges alone": _ours(",sites=[]"),
    "frugallm awq W4, the paper's scale": _ours(",duo=false"),
    "frugallm awq and gptq W4": ours("awq:group_size=64", "gptq:group_size=64", method="awq"),
    "frugallm rtn W4": ours("rtn:bits=4,group_size=64", method="rtn"),
    "frugallm awq W3": _ours(bits=3),
    "frugallm awq W3, scales alone": _ours(",clip=false", bits=3),
    "llm-compressor awq W3": _theirs("--bits=3", bits=3),
    "frugallm rtn W3": ours("rtn:bits=3,group_size=64", method="rtn", bits=3),
}


def grid(name: str) -> tuple[int, bool]:
    """Return what arms must share to be compared: bits, and whether there are zero points."""
    return ARMS[name].bits, "asymmetric" in name


def readable(folder: Path, name: str) -> Path | Checkpoint:
    """Return what the evaluator takes: plain transformers does not load packed zero points, so they are decoded here."""
    from frugallm.formats.decoded import Decoded

    return Decoded(folder) if "asymmetric" in name else folder


def verdicts(
    runs: dict[str, Any], evaluations: dict[str, Any], comparisons: list[dict[str, Any]]
) -> dict[str, Any]:
    """Hold the figures against the targets; a target whose arms did not run is left out."""
    found: dict[str, Any] = {}
    for main in (SYMMETRIC, ASYMMETRIC):
        rivals = [n for n in runs if not ARMS[n].ours and grid(n) == grid(main)]
        if main not in runs or not rivals:
            continue
        best = min(rivals, key=lambda n: evaluations[n].perplexity.value)
        pair = next(c for c in comparisons if (c["ours"], c["theirs"]) == (main, best))
        high = pair["perplexity_ratio"]["high"]
        found[f"{main}: perplexity below the peer's best"] = {
            "peer": best,
            **pair["perplexity_ratio"],
            "passed": high is not None and high < 1,
        }
    timed = [n for n in runs if not ARMS[n].ours and ARMS[n].timed]
    if SYMMETRIC in runs and timed:
        fastest = min(timed, key=lambda n: runs[n]["seconds"]["median"])
        share = runs[SYMMETRIC]["seconds"]["median"] / runs[fastest]["seconds"]["median"]
        found["time against the peer's fastest"] = {
            "peer": fastest,
            "value": share,
            "passed": share <= MOST_TIME,
        }
    return found


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """Return ours against everything of the same bits and kind of grid."""
    return [(a, b) for a in names for b in names if a != b and ARMS[a].ours and grid(a) == grid(b)]


def main() -> None:
    benchmark(
        "awq_vs_llmcompressor",
        ARMS,
        about=__doc__.splitlines()[0],
        more={"group_size": 64},
        pairs=pairs,
        verdicts=verdicts,
        candidate=readable,
    )


if __name__ == "__main__":
    main()
