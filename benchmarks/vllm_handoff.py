"""Folders of ours in vLLM: the same greedy text as in plain transformers?

``frugal run`` writes W4A16 and W8A8 folders, ``frugal export`` the GPTQ and AWQ layouts of 4 bits and a dense copy
of the unquantized model, which shows what the two engines differ in by themselves. Both engines run in one environment
without FrugalLM, continue the same prompts greedily and score the same text. They add in different orders, so a text may
part at a near tie: where it parts, the lead of the likelier token there is recorded.

Where activations are rounded, a difference in the last digit flips some roundings by a whole step, and after a few
blocks the rounding errors are others altogether. What that alone does is seen from transformers against itself with
sums in float64, which is run for every folder: vLLM cannot be closer than that.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import setting as common
from harness import GIB, Measurement, facts, frugal, measure, show_verdicts, table, write_result

HERE = Path(__file__).parent
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many days are there in a week?",
    "Name three animals that live in Africa.",
    "Explain in two sentences what a computer program is.",
    "What colour do you get when you mix blue and yellow?",
    "Translate to French: Good morning.",
    "Who wrote Romeo and Juliet?",
)
ANSWER_TOKENS, TEXT_TOKENS = 32, 512
# Times what transformers differs from itself by; chosen after a first look had shown 1.2 to 1.4 for W8A8.
MOST_APART = 2.0
# Without them vLLM would ask the network, count its users, and take most of the memory for keys and values.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


@dataclass(frozen=True)
class Arm:
    """One folder: the steps of a run, the layout it is exported to, and the type that the engines compute in.

    Without a layout both engines load the folder of the run. With ``packed`` vLLM does, and transformers, which does not
    read packed zero points, a dense copy of it.
    """

    steps: tuple[str, ...]
    export: str | None = None
    dtype: str = "float32"


# Near ties are fewest in float32; vLLM's kernel for 4 bits on a CPU takes 16-bit types only.
W4, ZEROS = ("gptq:bits=4,group_size=64",), ("awq:bits=4,group_size=64,symmetric=false",)
HALF, PACKED = "float16", "packed"
ARMS = {
    "dense": Arm((), "dense"),
    "dense in float16": Arm((), "dense", HALF),
    "dense in bfloat16": Arm((), "dense", "bfloat16"),
    "W4A16": Arm(W4, dtype=HALF),
    "W4A16 with zero points": Arm(ZEROS, PACKED, HALF),
    "W4A16 rotated": Arm(("rotate", *W4), dtype=HALF),
    "W8A8 per token": Arm(("smoothquant:activation=token",)),
    "W8A8 static": Arm(("smoothquant",)),
    "W4A16 in the GPTQ layout": Arm(W4, "gptq", HALF),
    "W4A16 in the AWQ layout": Arm(ZEROS, "awq", HALF),
}


def write_request(file: Path, setting: common.Setting) -> Any:
    """Write prompts and text as token ids, the same for all, and return the tokenizer."""
    from frugallm.models.open import open_checkpoint
    from frugallm.text import evaluation_windows, open_text

    tokenizer = open_checkpoint(common.MODEL).tokenizer
    prompts = [common.chat_tokens(tokenizer, text) for text in PROMPTS]
    text = open_text(setting.data / common.EVALUATION, "evaluate", tokenizer)
    [window] = evaluation_windows(text, tokenizer, 1, TEXT_TOKENS).tolist()
    request = {"prompts": prompts, "answer_tokens": ANSWER_TOKENS, "ends": [tokenizer.eos_token_id]}
    file.write_text(json.dumps(request | {"text": window}))
    return tokenizer


def make_folder(arm: Arm, place: dict[str, Path], setting: common.Setting) -> tuple[Path, Path]:
    """Write an arm's folder; return what vLLM loads and what transformers loads.

    GPTQ and AWQ layouts hold the values of the run that they were made from; transformers needs a GPU for them and gets
    a dense copy of that run.
    """
    run = place["work"] / ("-".join(arm.steps).replace(":", "-").replace(",", "-") or "dense")
    if not arm.steps:
        return place["dense"], place["dense"]
    if not run.exists():
        measure(frugal("run", common.MODEL, *arm.steps, "--out", run, *setting.run_options()))
    if arm.export is None:
        return run, run
    found = []
    for layout in (arm.export, "dense"):
        if layout == PACKED:
            found.append(run)
            continue
        out = run.with_name(f"{run.name}-{layout}")
        shutil.rmtree(out, ignore_errors=True)
        measure(frugal("export", run, "--to", layout, "--out", out))
        found.append(out)
    return found[0], found[1]


def ask(engine: str, folder: Path, dtype: str, place: dict[str, Path], threads: int) -> dict[str, Any]:
    """Let one engine answer and score; return its reply and what the process took."""
    reply = place["work"] / "reply.json"
    reply.unlink(missing_ok=True)
    options = [f"--engine={engine}", f"--dtype={dtype}", f"--threads={threads}"]
    files = ["--model", folder, "--request", place["request"], "--out", reply]
    command = [place["python"], HERE / "peer_vllm.py", *options, *files]
    log = place["work"] / f"{engine}.log"
    run = measure(command, threads=threads, environment=ENVIRONMENT, log=log)
    return json.loads(reply.read_text()) | {"cost": cost(run)}


def cost(run: Measurement) -> dict[str, Any]:
    return {"seconds": run.seconds, "peak_anonymous_bytes": run.peak_anonymous_bytes}


def compare(one_side: dict[str, Any], plain: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Hold one engine against plain transformers: texts, where they part, and log-probabilities of the text."""
    prompts = []
    for text, one, other in zip(PROMPTS, one_side["answers"], plain["answers"], strict=True):
        pairs = list(zip(one["tokens"], other["tokens"]))
        parts = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        prompts.append(
            {
                "prompt": text,
                "answer": tokenizer.decode(one["tokens"]),
                "answer_of_transformers": tokenizer.decode(other["tokens"]),
                "same": one["tokens"] == other["tokens"],
                "parts_at_token": parts,
                "lead_there": None if parts is None else min(one["leads"][parts], other["leads"][parts]),
            }
        )
    gaps = [abs(a - b) for a, b in zip(one_side["logprobs"], plain["logprobs"], strict=True)]
    return {
        "same": sum(p["same"] for p in prompts),
        "of": len(prompts),
        "mean_difference_of_logprobs": statistics.fmean(gaps),
        "largest_difference_of_logprobs": max(gaps),
        "perplexity": math.exp(-statistics.fmean(one_side["logprobs"])),
        "perplexity_of_transformers": math.exp(-statistics.fmean(plain["logprobs"])),
        "prompts": prompts,
    }


def verdicts(compared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Hold results against the targets: all texts the same, and not farther off than transformers from itself.

    The dense model is there to show what the engines differ in by themselves.
    """
    found = {}
    for name, by in compared.items():
        if not ARMS[name].steps:
            continue
        vllm, control = by["vllm"], by["transformers, float64"]
        found[f"{name}: same greedy text"] = {
            "same": vllm["same"],
            "of": vllm["of"],
            "transformers with itself": control["same"],
            "passed": vllm["same"] == vllm["of"],
        }
        key = "mean_difference_of_logprobs"
        found[f"{name}: log-probabilities as close as transformers to itself"] = {
            "vllm": vllm[key],
            "transformers with itself": control[key],
            "most": MOST_APART,
            "passed": vllm[key] <= MOST_APART * control[key],
        }
    return found


def main() -> None:
    parser = common.options(__doc__)
    peers.add_option(parser)
    args = parser.parse_args()
    about = facts()
    setting = common.given(args)
    names = common.pick(list(ARMS), args.only)
    python = peers.peer_python("vllm", args.envs)
    compared: dict[str, dict[str, Any]] = {}
    with common.kept_folder(args.work) as work:
        place = {"work": Path(work), "python": python, "request": Path(work) / "request.json"}
        place["dense"] = common.dense_folder(Path(work) / "dense")
        tokenizer = write_request(place["request"], setting)
        for name in names:
            arm = ARMS[name]
            there, here = make_folder(arm, place, setting)
            plain = ask("transformers", here, arm.dtype, place, args.threads)
            sides = {
                "vllm": ask("vllm", there, arm.dtype, place, args.threads),
                "transformers, float64": ask("transformers", here, "float64", place, args.threads),
            }
            compared[name] = {
                side: compare(reply, plain, tokenizer) | {"cost": reply["cost"]}
                for side, reply in sides.items()
            }
            same = [f"{side}: {found['same']} of {found['of']}" for side, found in compared[name].items()]
            print(f"{name}: same texts: {', '.join(same)}", flush=True)
    content = {
        "benchmark": "vllm_handoff",
        "facts": about,
        "setting": setting.facts() | {"answer_tokens": ANSWER_TOKENS},
        "peer": peers.versions("vllm", python),
        "arms": {
            name: {
                "steps": list(ARMS[name].steps),
                "export": ARMS[name].export,
                "dtype": ARMS[name].dtype,
                "against plain transformers": compared[name],
            }
            for name in names
        },
        "verdicts": verdicts(compared),
    }
    path = write_result("vllm_handoff", content)
    header = ["folder", "computed in", "same texts", "with itself", "logprobs apart, nats", "with itself"]
    rows = []
    for name, by in compared.items():
        cells = [name, ARMS[name].dtype]
        cells += [f"{found['same']} of {found['of']}" for found in by.values()]
        cells += [f"{found['mean_difference_of_logprobs']:.5f}" for found in by.values()]
        rows.append([*cells, f"{by['vllm']['cost']['peak_anonymous_bytes'] / GIB:.2f}"])
    print(f"\n{table([*header, 'vLLM, GiB'], rows)}\n")
    show_verdicts(content["verdicts"], path)


if __name__ == "__main__":
    main()
