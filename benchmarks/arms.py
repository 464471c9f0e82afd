"""What benchmarks against llm-compressor share: arms of both sides, run in turn, measured from outside."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
import setting as common
from harness import GIB, Measurement, facts, frugal, measure, show_verdicts, spread, table, write_result

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Arm:
    """One way of compressing: steps of ours, or the options of the peer's script."""

    options: tuple[str, ...]
    ours: bool
    timed: bool = False
    method: str = "gptq"
    bits: int = 4


def ours(*steps: str, **more: Any) -> Arm:
    """Return an arm of ours, given by its steps."""
    return Arm(steps, True, **more)


def theirs(*options: str, **more: Any) -> Arm:
    """Return an arm of the peer, given by options of ``peer_llmcompressor.py``."""
    return Arm(options, False, **more)


def command(arm: Arm, place: dict[str, Path], out: Path, setting: common.Setting) -> list[str | Path]:
    if arm.ours:
        return frugal("run", place["model"], *arm.options, "--out", out, *setting.run_options())
    script = HERE / "peer_llmcompressor.py"
    fixed = ["--group-size=64", f"--threads={setting.threads}"]
    files = ["--model", place["model"], "--tokens", place["tokens"], "--out", out]
    return [place["python"], script, *files, *fixed, *arm.options]


def facts_of(arm: Arm, run: Measurement) -> dict[str, Any]:
    """Return what one process took. Compressing is the pass over the blocks on our side, ``oneshot`` on the peer's."""
    stages = ("embedding", "compressing") if arm.ours else ("compress",)
    return {
        "seconds": run.seconds,
        "processor_seconds": run.processor_seconds,
        "compress_seconds": run.stage_seconds(*stages),
        "peak_anonymous_bytes": run.peak_anonymous_bytes,
        "peak_anonymous_bytes_compressing": run.stage_peak(*stages),
        "peak_resident_bytes": run.peak_resident_bytes,
        "stages": [asdict(s) for s in run.stages],
    }


def run_arms(
    arms: Mapping[str, Arm],
    place: dict[str, Path],
    setting: common.Setting,
    repeats: int,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Run every arm once, the timed ones ``repeats`` times, in turn; ``place`` takes the output folders.

    What each run took is kept beside its folder. With ``resume``, what is there is not run again; an arm that is not
    timed may also have its folder alone, from a benchmark that was broken off.
    """
    runs = {name: _kept(_folder(place, name), arm) if resume else [] for name, arm in arms.items()}
    for repeat in range(repeats):
        for name, arm in arms.items():
            out = place[name] = _folder(place, name)
            if len(runs[name]) > repeat or (runs[name] and not arm.timed):
                continue
            for old in (out, out.with_name(out.name + ".partial")):
                shutil.rmtree(old, ignore_errors=True)
            measured = measure(
                command(arm, place, out, setting), threads=setting.threads, log=out.with_suffix(".log")
            )
            runs[name].append(facts_of(arm, measured) | {"repeat": repeat})
            out.with_suffix(".runs.json").write_text(json.dumps(runs[name]))
            print(
                f"{name}: {measured.seconds:.0f} s, {measured.peak_anonymous_bytes / GIB:.2f} GiB", flush=True
            )
    return {name: _summary(arms[name], made, place[name]) for name, made in runs.items()}


def _folder(place: dict[str, Path], name: str) -> Path:
    return place["work"] / name.replace(" ", "-").replace(",", "")


def _kept(out: Path, arm: Arm) -> list[dict[str, Any]]:
    record = out.with_suffix(".runs.json")
    if not (out / "config.json").is_file():
        return []
    if record.is_file():
        return json.loads(record.read_text())
    return [] if arm.timed else [{"unmeasured": "the folder is of a benchmark that was broken off"}]


def _summary(arm: Arm, made: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    units = {
        "seconds": "s",
        "compress_seconds": "s",
        "peak_anonymous_bytes": "bytes",
        "peak_anonymous_bytes_compressing": "bytes",
        "peak_resident_bytes": "bytes",
    }
    known = [run for run in made if "seconds" in run]
    spreads = {
        key.replace("_bytes", ""): spread([run[key] for run in known], unit) if known else None
        for key, unit in units.items()
    }
    weights = common.folder_bytes(out)
    return {
        "options": list(arm.options),
        "timed": arm.timed,
        **spreads,
        "weights_bytes": weights,
        "runs": made,
    }


def show(arms: Mapping[str, Arm], runs: dict[str, Any], evaluations: dict[str, Any]) -> str:
    """Return the Markdown table of all arms."""
    header = ["arm", "perplexity", "KL (nats/token)", "top-1", "time (s)", "compressing (s)"]
    header += ["peak anonymous (GiB)", "while compressing", "weights (MB)"]
    rows = [["unquantized", f"{base_perplexity(evaluations):.2f}", "", "", "", "", "", "", ""]]
    for name, arm in runs.items():
        e = evaluations[name]
        rows.append(
            [
                name,
                f"{e.perplexity.value:.2f}",
                f"{e.kl.value:.4f}",
                f"{e.top1.value:.3f}",
                # Arms that are there for their quality may have run beside other work.
                f"{arm['seconds']['median']:.0f}" if arms[name].timed else "",
                f"{arm['compress_seconds']['median']:.0f}" if arms[name].timed else "",
                f"{arm['peak_anonymous']['max'] / GIB:.2f}" if arm["peak_anonymous"] else "",
                f"{arm['peak_anonymous_compressing']['max'] / GIB:.2f}" if arm["peak_anonymous"] else "",
                f"{arm['weights_bytes'] / 1e6:.0f}",
            ]
        )
    return table(header, rows)


def benchmark(
    name: str,
    arms: Mapping[str, Arm],
    *,
    about: str,
    more: Mapping[str, Any],
    pairs: Callable[[list[str]], list[tuple[str, str]]],
    verdicts: Callable[[dict[str, Any], dict[str, Any], list[dict[str, Any]]], dict[str, Any]],
    candidate: Callable[[Path, str], Any] = lambda folder, _: folder,
    fact: Callable[[Path], dict[str, Any]] = lambda _: {},
) -> None:
    """Do a whole benchmark against llm-compressor: options, runs, evaluation, verdicts, and the result.

    Parameters
    ----------
    about
        What ``--help`` says.
    more
        What belongs to the setting besides the shared one.
    pairs
        Which of the arms that ran are compared, ours first.
    verdicts
        Holds the figures against the targets: from runs, evaluations and comparisons.
    candidate
        What the evaluator takes for an arm, from its folder and name.
    fact
        More facts about a folder.
    """
    parser = common.options(about)
    peers.add_option(parser)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each timed arm")
    parser.add_argument("--result", default=name, help="name of the result's file")
    args = parser.parse_args()
    known = facts()
    setting = common.given(args)
    names = common.pick(list(arms), args.only)
    theirs_too = any(not arms[n].ours for n in names)
    python = peers.peer_python("llmcompressor", args.envs) if theirs_too else Path()
    with common.kept_folder(args.work) as work:
        place = {"work": Path(work), "python": python, "model": common.dense_folder(Path(work) / "dense")}
        place["tokens"] = common.calibration_tokens(
            setting, place["model"], Path(work) / "tokens.safetensors"
        )
        runs = run_arms({n: arms[n] for n in names}, place, setting, args.repeats, resume=args.resume)
        runs = {n: run | fact(place[n]) for n, run in runs.items()}
        candidates = {n: candidate(place[n], n) for n in names}
        evaluations = common.evaluate_folders(setting, candidates, place["model"])
    comparisons = [common.compare(evaluations[a], evaluations[b]) for a, b in pairs(names)]
    found = verdicts(runs, evaluations, comparisons)
    content = {
        "benchmark": name,
        "facts": known,
        "setting": setting.facts() | dict(more) | {"repeats": args.repeats},
        "peer": peers.versions("llmcompressor", python) if theirs_too else {},
        "unquantized_perplexity": base_perplexity(evaluations),
        "arms": {n: runs[n] | {"evaluation": evaluations[n].model_dump(mode="json")} for n in names},
        "comparisons": comparisons,
        "verdicts": found,
    }
    path = write_result(args.result, content)
    print(f"\n{show(arms, runs, evaluations)}\n")
    show_verdicts(found, path)


def base_perplexity(evaluations: dict[str, Any]) -> float:
    """Return the perplexity of the model before compression."""
    return math.exp(statistics.fmean(next(iter(evaluations.values())).reference_nll_per_window))
