"""How fast does our engine answer, against llama.cpp, OpenVINO GenAI and transformers?

Every side in a process of its own (``peer_engine.py``), the same prompts and threads, one side after the other in turn,
``--repeats`` times; medians count. Prompts of 512 tokens read one by one, one answer written, eight of 128 tokens to prompts
of 128, the time from a process's start to its first token, and memory. Ours also: the first token of a request that shares
1,000 tokens of its prompt with an earlier one. Then one answer behind prompts of up to 8,192 tokens, ours and llama.cpp's
fastest type of 4 bits; drawn in ``results/engine_context.svg``.

Quality beside speed: KL to the original of our folder *as the engine computes it* (inputs rounded to 8 bits), and of
llama.cpp's files as our reader reads them, with inputs not rounded, which favours them. OpenVINO's folders cannot be read
here.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import setting as common
from engine_context import by_context, svg
from harness import Measurement, facts, frugal, measure, show_verdicts, spread, table, write_result

HERE = Path(__file__).parent
STEPS = ("gptq:bits=4,group_size=64", "embedding")
PREFILL, PROMPT, ANSWER, STREAMS = 512, 128, 128, 8
READS = 5  # prompts that are only read, in one process: each takes a tenth of a second
SHARED, OWN = 1000, 32
CONTEXTS, CONTEXT_ANSWER = (512, 1024, 2048, 4096, 6144, 8192), 32
FIRST = 8
PLOT = "engine_context.svg"
# Targets, set before anything was measured.
DECODE, READ, BATCH, SHARING = 1.7, 1.5, 2.2, 8.0
START_SECONDS, ROOM_BYTES = 5.0, 450e6
PERPLEXITY, FROM_LINE = 0.01, 0.10


@dataclass(frozen=True)
class Arm:
    """One side: the engine, and the model in the form that it takes."""

    engine: str
    form: str


OURS = "frugallm W4 in groups of 64"
FOUR_BITS = ("llama.cpp Q4_0", "llama.cpp Q4_1")
INT8 = "OpenVINO int8"
ARMS = {
    OURS: Arm("frugal", "folder"),
    "frugallm on the Q4_1 file": Arm("frugal", "Q4_1"),
    **{f"llama.cpp {kind}": Arm("llama_cpp", kind) for kind in ("Q4_0", "Q4_1", "Q8_0")},
    INT8: Arm("openvino", "int8"),
    "OpenVINO int4": Arm("openvino", "int4"),
    "transformers bf16": Arm("transformers", "dense"),
}
#: Options of ``optimum-cli export openvino``; its default groups of 128 do not divide the model's widths.
OPENVINO = {"int8": ["--weight-format=int8"], "int4": ["--weight-format=int4", "--group-size=64"]}


def environments(names: list[str], place: Path) -> dict[str, Path]:
    """Return the Python of every peer that is wanted, before anything is timed."""
    found = {}
    for engine in {ARMS[name].engine for name in names} & set(peers.PEERS):
        try:
            found[engine] = peers.peer_python(engine, place)
        except subprocess.CalledProcessError as error:
            others = " ".join(f"'{name}'" for name in ARMS if ARMS[name].engine != engine)
            raise SystemExit(
                f"{engine} is not installed and cannot be ({error}). Leave it out: --only {others}"
            ) from error
    return found


def make_model(form: str, work: Path, setting: common.Setting, pythons: dict[str, Path]) -> Path:
    """Write the model in one form, unless it is there; return the folder or file."""
    if form == "dense":
        return common.dense_folder(work / "dense")
    out = work / (f"{form}.gguf" if form[0] == "Q" else form)
    if out.exists():
        return out
    part = out.with_name(f"part-{out.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    log = work / "models.log"
    if form == "folder":
        measure(frugal("run", common.MODEL, *STEPS, "--out", part, *setting.run_options()), log=log)
    elif form in OPENVINO:
        dense = common.dense_folder(work / "dense")
        tool = pythons["openvino"].with_name("optimum-cli")
        command = [tool, "export", "openvino", "--model", dense, "--task=text-generation-with-past"]
        measure([*command, *OPENVINO[form], part], log=log, environment={"HF_HUB_OFFLINE": "1"})
    else:
        measure(frugal("export", common.MODEL, f"--to=gguf:{form}", "--out", part), log=log)
    part.rename(out)
    return out


def requests(setting: common.Setting, work: Path) -> dict[str, Path]:
    """Write what the engines are asked, cut from the held-out text: ``speed``, ``ours`` (shared prompts too), ``context``."""
    from frugallm.models.open import open_checkpoint
    from frugallm.text import evaluation_windows, open_text

    tokenizer = open_checkpoint(common.MODEL).tokenizer
    text = open_text(setting.data / common.EVALUATION, "evaluate", tokenizer)
    once = READS * PREFILL + (1 + STREAMS) * PROMPT
    tokens = FIRST + 2 * once + 2 * (SHARED + OWN) + OWN + sum(CONTEXTS)
    [ids] = evaluation_windows(text, tokenizer, 1, tokens).tolist()
    taken = iter(ids)

    def cut(length: int) -> list[int]:
        return [next(taken) for _ in range(length)]

    def prompts() -> dict[str, Any]:
        return {
            "prefill": [cut(PREFILL) for _ in range(READS)],
            "decode": cut(PROMPT),
            "batch": [cut(PROMPT) for _ in range(STREAMS)],
        }

    both = {"first": cut(FIRST), "together": STREAMS * (PROMPT + ANSWER)}
    speed = {**both, "longest": SHARED + OWN + 16, "answer": ANSWER, "warm": prompts(), "timed": prompts()}
    beginning = cut(SHARED)
    shared = {"alone": cut(SHARED + OWN), "before": beginning + cut(OWN), "sharing": beginning + cut(OWN)}
    # An answer of one more than is counted ends at the context's end.
    long = [cut(length - CONTEXT_ANSWER - 1) for length in CONTEXTS]
    context = {**both, "longest": max(CONTEXTS), "answer": CONTEXT_ANSWER, "context": long}
    written = {"speed": speed, "ours": speed | {"shared": shared}, "context": context}
    for name, content in written.items():
        (work / f"{name}.json").write_text(json.dumps(content))
    return {name: work / f"{name}.json" for name in written}


def ask(arm: Arm, model: Path, request: Path, python: Path | str, threads: int) -> dict[str, Any]:
    """Let one engine do what is asked in a process of its own; return its reply with start and memory."""
    out = request.with_name("reply.json")
    out.unlink(missing_ok=True)
    command = [python, HERE / "peer_engine.py", f"--engine={arm.engine}", f"--threads={threads}"]
    run = measure(
        [*command, "--model", model, "--request", request, "--out", out],
        threads=threads,
        environment={"HF_HUB_OFFLINE": "1"},
        log=request.with_name("engines.log"),
    )
    # Resident memory beside it: llama.cpp leaves weights in the mapped file, which is not the process's own.
    memory = {"peak_bytes": run.peak_anonymous_bytes, "resident_bytes": run.peak_resident_bytes}
    return json.loads(out.read_text()) | memory | {"start": start(run)}


def start(run: Measurement) -> float:
    """Return the seconds from the start of the process to its first token."""
    return next(one["seconds"] for one in run.events if one["event"] == "first_token")


def in_turn(names: list[str], repeats: int, once: Any) -> dict[str, list[dict[str, Any]]]:
    """Run all arms in turn, every other time from the last to the first."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else names[::-1]:
            runs[name].append(once(name))
            print(f"{name}: {repeat + 1} of {repeats}", flush=True)
    return runs


UNITS = {
    "prefill": "tokens/s",
    "decode": "tokens/s",
    "batch": "tokens/s",
    "start": "s",
    "peak_bytes": "bytes",
}
UNITS |= {"resident_bytes": "bytes", "alone_seconds": "s", "shared_seconds": "s"}


def summed_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return every figure of an arm with its spread."""
    figures = {key: spread([run[key] for run in runs], unit) for key, unit in UNITS.items() if key in runs[0]}
    return figures | {"how": runs[0]["facts"]}


def quality(names: list[str], models: dict[str, Path], judge: common.Judge) -> dict[str, dict[str, Any]]:
    """Return KL and loss of every arm that can be evaluated: its values with inputs as they are, and ours on the engine."""
    from frugallm.engine.llm import LLM
    from frugallm.evaluate.predictions import compare_window
    from frugallm.inference.measures import RunnerPredictions

    readable = [name for name in names if ARMS[name].engine in ("frugal", "llama_cpp")]
    wanted = {ARMS[name].form: models[ARMS[name].form] for name in readable}
    found = judge.evaluate(wanted) if wanted else {}
    results: dict[str, dict[str, Any]] = {}
    for name in readable:
        one = found[ARMS[name].form]
        results[name] = {"evaluation": one.model_dump(mode="json")}
        if ARMS[name].engine != "frugal":
            continue
        llm = LLM(str(models[ARMS[name].form]), cache_tokens=judge.windows.shape[1])
        engine, reference = RunnerPredictions(llm.engine.runner), judge.reference
        rows = [
            compare_window(engine, engine.states(window), window, reference.predictions, reference.states(i))
            for i, window in enumerate(judge.windows)
        ]
        nll, kl, _ = (statistics.fmean(column) for column in zip(*rows))
        results[name]["on_engine"] = {
            "kl": kl,
            "perplexity": math.exp(nll),
            "perplexity_ratio": math.exp(nll - statistics.fmean(one.nll_per_window)),
        }
    return results


def kl(found: dict[str, Any]) -> float:
    """Return the KL of an arm: on the engine where that is known, else of its values."""
    return found["on_engine"]["kl"] if "on_engine" in found else found["evaluation"]["kl"]["value"]


def fastest(arms: dict[str, Any]) -> str | None:
    """Return llama.cpp's fastest arm of 4 bits in decode."""
    there = [name for name in FOUR_BITS if name in arms]
    return max(there, key=lambda name: arms[name]["decode"]["median"], default=None)


def verdicts(arms: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Hold the figures against the targets; what was not measured has no verdict."""
    held: dict[str, Any] = {}
    if OURS not in arms:
        return held
    ours = arms[OURS]

    def rate(key: str, words: str, name: str | None, least: float) -> None:
        if name in arms:
            value = ours[key]["median"] / arms[name][key]["median"]
            held[f"{words}: at least {least:g} times {name}"] = {"value": value, "passed": value >= least}

    four = fastest(arms)
    rate("decode", "decode", four, DECODE)
    if four is not None:
        one, other = kl(ours), kl(arms[four])
        held[f"KL not above that of {four}"] = {"value": one, "theirs": other, "passed": one <= other}
    rate("prefill", f"prefill of {PREFILL}", INT8, READ)
    ratio = ours["on_engine"]["perplexity_ratio"]
    near = abs(ratio - 1) <= PERPLEXITY
    held["perplexity on the engine within 1 % of inputs not rounded"] = {"value": ratio, "passed": near}
    rate("batch", f"{STREAMS} streams end to end", INT8, BATCH)
    started = ours["start"]["median"]
    held["start of the process to first token, at most 5 s"] = {
        "value": started,
        "passed": started <= START_SECONDS,
    }
    beside = ours["peak_bytes"]["median"] - ours["how"]["weights_bytes"] - ours["how"]["cache_bytes"]
    held["memory beside weights and cache, at most 450 MB"] = {
        "value": beside,
        "unit": "bytes",
        "passed": beside <= ROOM_BYTES,
    }
    sooner = ours["alone_seconds"]["median"] / ours["shared_seconds"]["median"]
    held[f"first token with {SHARED:,} shared tokens: at least {SHARING:g} times sooner"] = {
        "value": sooner,
        "passed": sooner >= SHARING,
    }
    if OURS in context:
        away = context[OURS]["largest_distance_from_line"]
        held["time of a token grows linearly with the context"] = {
            "value": away,
            "most": FROM_LINE,
            "passed": away <= FROM_LINE,
        }
    return held


def show(arms: dict[str, Any]) -> str:
    header = ["engine and model", f"prefill of {PREFILL}", "decode", f"{STREAMS} × ({PROMPT} → {ANSWER})"]
    rows = []
    for name, one in arms.items():
        rates = [f"{one[key]['median']:,.0f}" for key in ("prefill", "decode", "batch")]
        known = "on_engine" in one or "evaluation" in one
        rest = [f"{one['start']['median']:.2f}", f"{one['peak_bytes']['median'] / 1e6:,.0f}"]
        rest.append(f"{one['resident_bytes']['median'] / 1e6:,.0f}")
        rows.append([name, *rates, *rest, f"{kl(one):.4f}" if known else "not known"])
    return table([*header, "first token, s", "peak, MB", "resident, MB", "KL"], rows)


def main() -> None:
    parser = common.options(__doc__)
    peers.add_option(parser)
    parser.add_argument("--repeats", type=int, default=5, help="of every arm")
    parser.add_argument(
        "--context-repeats", type=int, default=3, help="of decode against context; 0: not at all"
    )
    args = parser.parse_args()
    about = facts()
    setting = common.given(args)
    names = common.pick(list(ARMS), args.only)
    pythons = environments(names, args.envs)
    with common.kept_folder(args.work) as folder:
        work = Path(folder).absolute()
        models = {}
        for form in dict.fromkeys(ARMS[name].form for name in names):
            models[form] = make_model(form, work, setting, pythons)
        judged = quality(names, models, common.Judge(setting, common.dense_folder(work / "dense")))
        asked = requests(setting, work)
        limits: list[dict[str, float]] = []

        def once(name: str, which: str = "speed") -> dict[str, Any]:
            arm = ARMS[name]
            which = "ours" if which == "speed" and arm.engine == "frugal" else which
            python = pythons.get(arm.engine) or sys.executable
            return ask(arm, models[arm.form], asked[which], python, args.threads)

        def timed(name: str) -> dict[str, Any]:
            if name == names[0]:
                limits.append(machine_limits(args.threads))
            return once(name)

        arms = {n: summed_up(r) | judged.get(n, {}) for n, r in in_turn(names, args.repeats, timed).items()}
        long = [name for name in (OURS, fastest(arms)) if name in names] if args.context_repeats else []
        context = {
            name: by_context(runs)
            for name, runs in in_turn(long, args.context_repeats, lambda name: once(name, "context")).items()
        }
    content = {
        "benchmark": "engine_speed",
        "facts": about,
        "setting": setting.facts() | {"steps": STEPS, "repeats": args.repeats, "openvino": OPENVINO},
        "peers": {name: peers.versions(name, python) for name, python in pythons.items()},
        "limits": limits,
        "arms": arms,
        "context": context,
        "verdicts": verdicts(arms, context),
    }
    path = write_result("engine_speed", content)
    if context:
        path.with_name(PLOT).write_text(svg(context))
    print(f"\n{show(arms)}\n")
    show_verdicts(content["verdicts"], path)


def machine_limits(threads: int) -> dict[str, float]:
    """Measure reading memory and products now."""
    import torch

    from frugallm.kernels.limits import limits

    torch.set_num_threads(threads)
    return limits(rounds=3)


if __name__ == "__main__":
    main()
