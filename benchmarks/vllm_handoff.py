"""Folders of ours in vLLM: the same greedy text as in plain transformers?

``frugal run`` writes a W4A16 and two W8A8 folders, ``frugal export`` the GPTQ and AWQ layouts of 4 bits and a dense copy
of the unquantized model, which shows what the two engines differ in by themselves. Both engines run in one environment
without FrugalLM and continue the same prompts greedily. They add in different orders, so a text may part at a near tie:
where it parts, the lead of the likelier token there is recorded.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import setting as common
from harness import GIB, Measurement, facts, frugal, measure, table, write_result

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
ANSWER_TOKENS = 32
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
    """One folder: the steps of a run, the layout it is exported to, and the type that the engines compute in."""

    steps: tuple[str, ...]
    export: str | None = None
    dtype: str = "float32"


# Near ties are fewest in float32; vLLM's kernel for 4 bits on a CPU takes 16-bit types only.
W4, HALF = ("gptq:bits=4,group_size=64",), "float16"
ARMS = {
    "dense": Arm((), "dense"),
    "dense in float16": Arm((), "dense", HALF),
    "dense in bfloat16": Arm((), "dense", "bfloat16"),
    "W4A16": Arm(W4, dtype=HALF),
    "W8A8 per token": Arm(("smoothquant:activation=token",)),
    "W8A8 static": Arm(("smoothquant",)),
    "W4A16 in the GPTQ layout": Arm(W4, "gptq", HALF),
    "W4A16 in the AWQ layout": Arm(("awq:bits=4,group_size=64,symmetric=false",), "awq", HALF),
}


def write_request(file: Path) -> Any:
    """Write the prompts as token ids, the same for all, and return the tokenizer."""
    from frugallm.cli.generate import encode
    from frugallm.models.open import open_checkpoint

    tokenizer = open_checkpoint(common.MODEL).tokenizer
    prompts = [encode(tokenizer, text, raw=False)["input_ids"][0].tolist() for text in PROMPTS]
    request = {"prompts": prompts, "answer_tokens": ANSWER_TOKENS, "ends": [tokenizer.eos_token_id]}
    file.write_text(json.dumps(request))
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
        out = run.with_name(f"{run.name}-{layout}")
        shutil.rmtree(out, ignore_errors=True)
        measure(frugal("export", run, "--to", layout, "--out", out))
        found.append(out)
    return found[0], found[1]


def ask(engine: str, folder: Path, arm: Arm, place: dict[str, Path], threads: int) -> dict[str, Any]:
    """Let one engine continue the prompts; return its answers and what the process took."""
    reply = place["work"] / "reply.json"
    reply.unlink(missing_ok=True)
    options = [f"--engine={engine}", f"--dtype={arm.dtype}", f"--threads={threads}"]
    files = ["--model", folder, "--request", place["request"], "--out", reply]
    command = [place["python"], HERE / "peer_vllm.py", *options, *files]
    log = place["work"] / f"{engine}.log"
    run = measure(command, threads=threads, environment=ENVIRONMENT, log=log)
    return json.loads(reply.read_text()) | {"cost": cost(run)}


def cost(run: Measurement) -> dict[str, Any]:
    return {"seconds": run.seconds, "peak_anonymous_bytes": run.peak_anonymous_bytes}


def compare(vllm: dict[str, Any], plain: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return, prompt by prompt, both texts and where they part."""
    prompts = []
    for text, one, other in zip(PROMPTS, vllm["answers"], plain["answers"], strict=True):
        pairs = list(zip(one["tokens"], other["tokens"]))
        parts = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        prompts.append(
            {
                "prompt": text,
                "vllm": tokenizer.decode(one["tokens"]),
                "transformers": tokenizer.decode(other["tokens"]),
                "same": one["tokens"] == other["tokens"],
                "parts_at_token": parts,
                "lead_there": None if parts is None else min(one["leads"][parts], other["leads"][parts]),
            }
        )
    return {"same": sum(p["same"] for p in prompts), "of": len(prompts), "prompts": prompts}


def verdicts(compared: dict[str, Any]) -> dict[str, Any]:
    """Hold every arm against the target: all texts the same."""
    return {
        f"{name}: same greedy text": {
            "same": found["same"],
            "of": found["of"],
            "leads where they part": [p["lead_there"] for p in found["prompts"] if not p["same"]],
            "passed": found["same"] == found["of"],
        }
        for name, found in compared.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_options(parser)
    parser.add_argument(
        "--envs", type=Path, default=peers.ENVIRONMENTS, help="folder of the peers' environments"
    )
    args = parser.parse_args()
    about = facts()
    setting = common.Setting(args.data, samples=args.samples, windows=args.windows, threads=args.threads)
    names = common.pick(list(ARMS), args.only)
    python = peers.peer_python("vllm", args.envs)
    answers, compared = {}, {}
    with common.kept_folder(args.work) as work:
        place = {"work": Path(work), "python": python, "request": Path(work) / "request.json"}
        place["dense"] = common.dense_folder(Path(work) / "dense")
        tokenizer = write_request(place["request"])
        for name in names:
            there, here = make_folder(ARMS[name], place, setting)
            answers[name] = {
                "vllm": ask("vllm", there, ARMS[name], place, args.threads),
                "transformers": ask("transformers", here, ARMS[name], place, args.threads),
            }
            compared[name] = compare(answers[name]["vllm"], answers[name]["transformers"], tokenizer)
            print(f"{name}: {compared[name]['same']} of {compared[name]['of']} texts the same", flush=True)
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
                "cost": {engine: answers[name][engine]["cost"] for engine in answers[name]},
                **compared[name],
            }
            for name in names
        },
        "verdicts": verdicts(compared),
    }
    path = write_result("vllm_handoff", content)
    header = ["folder", "computed in", "same texts", "lead where they part, nats", "vLLM, s", "GiB"]
    rows = []
    for name, found in compared.items():
        leads = [f"{p['lead_there']:.3f}" for p in found["prompts"] if p["lead_there"] is not None]
        took = answers[name]["vllm"]["cost"]
        cells = [name, ARMS[name].dtype, f"{found['same']} of {found['of']}", ", ".join(leads)]
        rows.append([*cells, f"{took['seconds']:.0f}", f"{took['peak_anonymous_bytes'] / GIB:.2f}"])
    print(f"\n{table(header, rows)}\n")
    for text, verdict in content["verdicts"].items():
        print(f"- {'PASS' if verdict['passed'] else 'FAIL'}: {text}")
    print(f"\nWritten to {path}.")


if __name__ == "__main__":
    main()
