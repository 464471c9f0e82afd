"""GPTQ and rounding against llm-compressor: perplexity, time and memory, both sides in one run.

The peer starts from the same float32 folder and calibrates with the same token windows. It is given every
setting it offers for this job (act-order, three observers, bf16 and batches for speed), and ours is held
against its best. Each arm is a whole process; timed arms run several times, ours and theirs in turn.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import peers
import setting as common
from arms import base_perplexity, ours, run_arms, show, theirs
from harness import GIB, facts, write_result

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_options(parser)
    parser.add_argument(
        "--envs", type=Path, default=peers.ENVIRONMENTS, help="folder of the peers' environments"
    )
    parser.add_argument("--repeats", type=int, default=2, help="runs of each timed arm")
    args = parser.parse_args()
    about = facts()
    setting = common.Setting(args.data, samples=args.samples, windows=args.windows, threads=args.threads)
    names = common.pick(list(ARMS), args.only)
    python = peers.peer_python("llmcompressor", args.envs)
    with common.kept_folder(args.work) as work:
        place = {"work": Path(work), "python": python, "model": common.dense_folder(Path(work) / "dense")}
        place["tokens"] = common.calibration_tokens(
            setting, place["model"], Path(work) / "tokens.safetensors"
        )
        arms = run_arms({n: ARMS[n] for n in names}, place, setting, args.repeats, resume=args.resume)
        evaluations = common.evaluate_folders(setting, {n: place[n] for n in names}, place["model"])
    pairs = [
        (a, b)
        for a in names
        for b in names
        if a != b
        and ARMS[a].ours
        and ARMS[a].bits == ARMS[b].bits
        and (not ARMS[b].ours or ARMS[b].method == "rtn")
    ]
    comparisons = [common.compare(evaluations[a], evaluations[b]) for a, b in pairs]
    content = {
        "benchmark": "gptq_vs_llmcompressor",
        "facts": about,
        "setting": setting.facts() | {"group_size": 64, "symmetric": True, "repeats": args.repeats},
        "peer": peers.versions("llmcompressor", python),
        "unquantized_perplexity": base_perplexity(evaluations),
        "arms": {n: arms[n] | {"evaluation": evaluations[n].model_dump(mode="json")} for n in names},
        "comparisons": comparisons,
        "verdicts": verdicts(arms, evaluations, comparisons),
    }
    path = write_result("gptq_vs_llmcompressor", content)
    print(f"\n{show(ARMS, arms, evaluations)}\n")
    for text, verdict in content["verdicts"].items():
        print(f"- {'PASS' if verdict['passed'] else 'FAIL'}: {text} ({verdict})")
    print(f"\nWritten to {path}.")


if __name__ == "__main__":
    main()
