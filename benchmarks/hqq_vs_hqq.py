"""HQQ against the hqq package: perplexity at equal bytes, and time, both sides in one run.

Both sides round the linears of the same float32 folder without any text, in groups of 64 along the input, with a scale
and a zero point of 16 bits each. The peer gets its default and its slower optimizer without early stopping; ours is
held against the better of these. The peer's folder is dense and holds the values that its codes stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peers
import setting as common
from arms import base_perplexity
from harness import facts, frugal, measure, run_once, show_verdicts, table, write_result

HERE = Path(__file__).parent
GROUP = 64


@dataclass(frozen=True)
class Arm:
    """One way of rounding: a step of ours, or the options of the peer's script."""

    bits: int
    step: str = ""
    options: tuple[str, ...] = ()
    side_bits: int = 32  # of scale and zero point, per group

    @property
    def bits_per_weight(self) -> float:
        """What a weight takes, its share of scale and zero point included."""
        return self.bits + self.side_bits / GROUP


def arms(bits: int) -> dict[str, Arm]:
    """Return the arms at so many bits."""
    grid = f"bits={bits},group_size={GROUP}"
    return {
        f"frugallm hqq W{bits}": Arm(bits, f"hqq:{grid}"),
        f"frugallm hqq W{bits}, zero points alone": Arm(bits, f"hqq:{grid},fit_scale=false"),
        f"frugallm hqq W{bits}, integer zero points": Arm(
            bits, f"hqq:{grid},zero=integer", side_bits=16 + bits
        ),
        f"frugallm rtn W{bits} asymmetric": Arm(bits, f"rtn:{grid},symmetric=false", side_bits=16 + bits),
        f"hqq W{bits}": Arm(bits, options=(f"--bits={bits}",)),
        f"hqq W{bits}, slow": Arm(bits, options=(f"--bits={bits}", "--slow")),
    }


def command(arm: Arm, place: dict[str, Path], out: Path, setting: common.Setting) -> list[str | Path]:
    if arm.step:
        return frugal("run", place["model"], arm.step, "--out", out, *setting.run_options())
    options = [f"--group-size={GROUP}", f"--threads={setting.threads}", *arm.options]
    return [place["python"], HERE / "peer_hqq.py", "--model", place["model"], "--out", out, *options]


def verdicts(chosen: dict[str, Arm], evaluations: dict[str, Any]) -> dict[str, Any]:
    """Hold ours against the better of the peer's at every number of bits for which both ran."""
    found: dict[str, Any] = {}
    for bits in sorted({arm.bits for arm in chosen.values()}):
        main = f"frugallm hqq W{bits}"
        rivals = [name for name, arm in chosen.items() if not arm.step and arm.bits == bits]
        if main not in chosen or not rivals:
            continue
        best = min(rivals, key=lambda name: evaluations[name].perplexity.value)
        pair = common.compare(evaluations[main], evaluations[best])
        found[f"W{bits}: perplexity not above hqq's at equal bytes"] = {
            "peer": best,
            **pair["perplexity_ratio"],
            "passed": pair["perplexity_ratio"]["value"] <= 1,
        }
    return found


def made(arm: Arm, place: dict[str, Path], out: Path, setting: common.Setting) -> dict[str, Any]:
    """Make the folder of an arm; return what it took."""
    run = measure(command(arm, place, out, setting), threads=setting.threads)
    return {
        "step": arm.step,
        "options": list(arm.options),
        "bits_per_weight": arm.bits_per_weight,
        "seconds": run.seconds,
        "compress_seconds": run.stage_seconds("compressing" if arm.step else "compress"),
        "peak_anonymous_bytes": run.peak_anonymous_bytes,
    }


def main() -> None:
    parser = common.options(__doc__)
    peers.add_option(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3], choices=(2, 3, 4, 8))
    args = parser.parse_args()
    about = facts()
    setting = common.given(args)
    every = {name: arm for bits in args.bits for name, arm in arms(bits).items()}
    chosen = {name: every[name] for name in common.pick(list(every), args.only)}
    python = peers.peer_python("hqq", args.envs)
    runs: dict[str, Any] = {}
    with common.kept_folder(args.work) as work:
        place = {"python": python, "model": common.dense_folder(Path(work) / "dense")}
        folders = {name: Path(work) / name.replace(" ", "-").replace(",", "") for name in chosen}
        for name, arm in chosen.items():
            make = partial(made, arm, place, folders[name], setting)
            runs[name] = run_once(folders[name], name, make, resume=args.resume)
        evaluations = common.evaluate_folders(setting, folders, place["model"])
    found = verdicts(chosen, evaluations)
    base = base_perplexity(evaluations)
    content = {
        "benchmark": "hqq_vs_hqq",
        "facts": about,
        "setting": setting.facts() | {"group_size": GROUP},
        "peer": peers.versions("hqq", python),
        "unquantized_perplexity": base,
        "arms": {n: runs[n] | {"evaluation": evaluations[n].model_dump(mode="json")} for n in chosen},
        "verdicts": found,
    }
    path = write_result("hqq_vs_hqq", content)
    header = ["arm", "bits per weight", "perplexity", "KL (nats/token)", "time (s)", "compressing (s)"]
    rows = [["unquantized", "", f"{base:.2f}", "", "", ""]]
    for name in chosen:
        e, run = evaluations[name], runs[name]
        rows.append(
            [
                name,
                f"{run['bits_per_weight']:.2f}",
                f"{e.perplexity.value:.2f}",
                f"{e.kl.value:.4f}",
                f"{run['seconds']:.0f}",
                f"{run['compress_seconds']:.0f}",
            ]
        )
    print(f"\n{table(header, rows)}\n")
    show_verdicts(found, path)


if __name__ == "__main__":
    main()
