"""How much of the loss of plain W8A8 with one scale a token does LLM.int8() take away?

Both round weights per row and inputs per token to 8 bits; ``llm_int8`` leaves input channels with outliers as they are.
Loss is measured twice: as perplexity above the model before, and as KL divergence from it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import setting as common
from arms import base_perplexity
from harness import facts, run_once, run_step, table, write_result

MOST_LOST = 0.5
MAIN, PLAIN = "llm_int8", "W8A8 per token"
ARMS = {
    MAIN: "llm_int8",
    PLAIN: "llm_int8:threshold=0",
    "W8A8 per token, smoothed": "smoothquant:activation=token",
    "llm_int8, threshold 3": "llm_int8:threshold=3",
    "llm_int8, threshold 12": "llm_int8:threshold=12",
}


def shares(evaluations: dict[str, Any], base: float) -> dict[str, dict[str, float]]:
    """Return, for every arm, the share of the plain arm's loss that it has, in perplexity and in KL."""
    lost = {name: (e.perplexity.value - base, e.kl.value) for name, e in evaluations.items()}
    if PLAIN not in lost:
        return {}
    whole = lost[PLAIN]
    return {name: {"perplexity": one[0] / whole[0], "kl": one[1] / whole[1]} for name, one in lost.items()}


def main() -> None:
    parser = common.options(__doc__)
    args = parser.parse_args()
    about = facts()
    setting = common.given(args)
    steps = {name: ARMS[name] for name in common.pick(list(ARMS), args.only)}
    runs: dict[str, Any] = {}
    with common.kept_folder(args.work) as work:
        model = common.dense_folder(Path(work) / "dense")
        folders = {name: Path(work) / name.replace(" ", "-").replace(",", "") for name in steps}
        for name, step in steps.items():
            make = partial(run_step, model, step, folders[name], setting.run_options(), setting.threads)
            runs[name] = run_once(folders[name], name, make, resume=args.resume)
        evaluations = common.evaluate_folders(setting, folders, model)
    base = base_perplexity(evaluations)
    share = shares(evaluations, base)
    passed = MAIN in share and max(share[MAIN].values()) <= MOST_LOST
    content = {
        "benchmark": "llm_int8_vs_w8a8",
        "facts": about,
        "setting": setting.facts(),
        "unquantized_perplexity": base,
        "arms": {
            name: {
                "step": step,
                **runs[name],
                "share_of_loss": share.get(name),
                "evaluation": evaluations[name].model_dump(mode="json"),
            }
            for name, step in steps.items()
        },
        "passed": passed,
    }
    path = write_result("llm_int8_vs_w8a8", content)
    header = ["arm", "step", "perplexity", "KL (nats/token)", "share of the loss in perplexity", "in KL"]
    rows = [["unquantized", "", f"{base:.3f}", "", "", ""]]
    for name, step in steps.items():
        e, s = evaluations[name], share.get(name)
        parts = ["", ""] if s is None else [f"{s['perplexity']:.1%}", f"{s['kl']:.1%}"]
        rows.append([name, f"`{step}`", f"{e.perplexity.value:.3f}", f"{e.kl.value:.5f}", *parts])
    print(f"\n{table(header, rows)}\n\nWritten to {path}.")
    print(f"{'PASS' if passed else 'FAIL'}: at most {MOST_LOST:.0%} of the loss of plain W8A8 per token.")


if __name__ == "__main__":
    main()
