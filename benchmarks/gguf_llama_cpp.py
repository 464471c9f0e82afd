"""GGUF files of ours in llama.cpp: does it compute what our own reader says the file means?

``frugal export`` writes the model in each type; llama.cpp, in an environment of its own, and ``frugallm.evaluate`` measure the
perplexity of the same file on the same token windows, and both continue the same prompt greedily. The vocabulary is
checked as well: llama.cpp must cut the held-out text into the same tokens.

llama.cpp rounds the inputs of quantized linears to 8 bits in blocks and keeps keys and values in 16 bits, our evaluation
does neither. What the first alone does is measured too: our own evaluation and answer with inputs rounded like that.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import setting as common
from harness import GIB, Measurement, facts, frugal, measure, show_verdicts, table, write_result

HERE = Path(__file__).parent
MOST_DIFFERENCE = 0.005  # of the perplexity
PROMPT, ANSWER_TOKENS = "What is the capital of France?", 32
TEXT_CHARACTERS = 20_000


@dataclass(frozen=True)
class Arm:
    """One export: the type, and whether errors are weighed by an importance matrix."""

    kind: str
    imatrix: bool = False

    def options(self, setting: common.Setting) -> list[str]:
        """Return the options of ``frugal export``."""
        weighed = ["--imatrix", f"--text={setting.data / common.CALIBRATION}", f"--seed={setting.seed}"]
        weighed += [f"--samples={setting.samples}", f"--seq-len={setting.seq_len}"]
        return [f"--to=gguf:{self.kind}", "--overwrite", *(weighed if self.imatrix else [])]


ARMS = {
    kind: Arm(kind)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL")
}
ARMS |= {kind: Arm(kind) for kind in ("Q3_K", "Q2_K")}
ARMS |= {f"{kind} imatrix": Arm(kind, imatrix=True) for kind in ("Q4_K", "Q4_0", "IQ4_NL")}


def write_request(setting: common.Setting, file: Path) -> dict[str, Any]:
    """Write what llama.cpp is asked, the same for all files, and return it."""
    from frugallm.models.open import open_checkpoint
    from frugallm.text import evaluation_windows, open_text

    tokenizer = open_checkpoint(common.MODEL).tokenizer
    text = open_text(setting.data / common.EVALUATION, "evaluate", tokenizer)
    windows = evaluation_windows(text, tokenizer, setting.windows, setting.window_length)
    beginning = "\n\n".join(text.documents)[:TEXT_CHARACTERS]
    request = {
        "windows": windows.tolist(),
        "prompt": common.chat_tokens(tokenizer, PROMPT),
        "answer_tokens": ANSWER_TOKENS,
        "ends": [tokenizer.eos_token_id],
        "text": beginning,
    }
    file.write_text(json.dumps(request))
    return request | {"tokens": tokenizer(beginning, add_special_tokens=False)["input_ids"]}


def round_inputs(model: Any, file: Path) -> None:
    """Let every linear of the model that is quantized in the file round its inputs to 8 bits, as llama.cpp does.

    Blocks hold 256 entries and a scale of 32 bits for K types (Q8_K), else 32 entries and one of 16 bits (Q8_0).
    """
    import torch

    from frugallm.models.gguf_file import GGUFFile

    stored = GGUFFile(file)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        path = f"{name}.weight"
        kind, _ = stored.stored(path if path in stored.names() else f"{stored.family.embedding}.weight")
        if not kind.startswith(("F", "BF")):
            block, half = (256, False) if kind.endswith("_K") else (32, True)
            module.register_forward_pre_hook(lambda _, x, b=block, h=half: (rounded(x[0], b, h), *x[1:]))


def rounded(x: Any, block: int, half: bool) -> Any:
    """Return float32 inputs ``(…, width)`` as 8 bits per entry and a scale per block stand for them."""
    parts = x.reshape(-1, block)
    scale = parts.abs().amax(1, keepdim=True) / 127
    codes = (parts / scale.clamp_min(1e-30)).round()
    return (codes * (scale.half().float() if half else scale)).reshape(x.shape)


def with_rounded_inputs(file: Path, request: dict[str, Any]) -> tuple[list[float], list[int]]:
    """Return, for the file read by us with inputs rounded like in llama.cpp, loss per window and answer."""
    import torch

    from frugallm.evaluate.precision import product_dtype
    from frugallm.evaluate.predictions import Predictions, compare_window
    from frugallm.models import load

    model, _ = load(file, dtype=torch.float32)
    round_inputs(model, file)
    predictions = Predictions(model, product_dtype("auto"))
    windows = [torch.tensor(ids) for ids in request["windows"]]
    losses = [compare_window(predictions, predictions.states(ids), ids)[0] for ids in windows]
    return losses, answer(model, request)


def our_answer(file: Path, request: dict[str, Any]) -> tuple[list[int], Any]:
    """Return the tokens with which the file, read by us, continues the prompt, and its tokenizer."""
    from frugallm.models import load

    model, tokenizer = load(file)
    return answer(model, request), tokenizer


def answer(model: Any, request: dict[str, Any]) -> list[int]:
    """Return the tokens with which a model continues the prompt greedily."""
    import torch

    ids = torch.tensor([request["prompt"]])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=request["answer_tokens"],
            eos_token_id=request["ends"],
            pad_token_id=request["ends"][0],
        )
    return out[0, ids.shape[1] :].tolist()


def run_arm(name: str, place: dict[str, Path], setting: common.Setting) -> tuple[Path, dict[str, Any]]:
    """Export one file and let llama.cpp measure it; return the file and what both processes took."""
    stem = place["work"] / name.replace(" ", "-")
    file, reply = stem.with_suffix(".gguf"), stem.with_suffix(".reply.json")
    export = frugal("export", common.MODEL, "--out", file, *ARMS[name].options(setting))
    exported = measure(export, threads=setting.threads, log=stem.with_suffix(".export.log"))
    script = [place["python"], HERE / "peer_llama_cpp.py", f"--threads={setting.threads}"]
    files = ["--model", file, "--request", place["request"], "--out", reply]
    measured = measure([*script, *files], threads=setting.threads, log=stem.with_suffix(".llama_cpp.log"))
    took = {"export": cost(exported), "llama_cpp": cost(measured), "bytes": file.stat().st_size}
    print(
        f"{name}: exported in {exported.seconds:.0f} s, measured there in {measured.seconds:.0f} s",
        flush=True,
    )
    return file, took | {"said": summary(exported), "reply": json.loads(reply.read_text())}


def cost(run: Measurement) -> dict[str, Any]:
    return {"seconds": run.seconds, "peak_anonymous_bytes": run.peak_anonymous_bytes}


def summary(exported: Measurement) -> list[str]:
    """Return what the export said about types and rounding."""
    return [line.strip() for line in exported.log.splitlines() if "tensors" in line or "stored as" in line]


def compare(evaluation: Any, arm: dict[str, Any], file: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Hold what llama.cpp found against what we find in the same file."""
    reply = arm.pop("reply")
    theirs = math.exp(statistics.fmean(reply["nll_per_window"]))
    gaps = [abs(a - b) for a, b in zip(reply["nll_per_window"], evaluation.nll_per_window, strict=True)]
    ours, tokenizer = our_answer(file, request)
    losses, answer_so = with_rounded_inputs(file, request)
    so = math.exp(statistics.fmean(losses))
    same = next((i for i, (a, b) in enumerate(zip(ours, reply["answer"])) if a != b), None)
    return {
        "perplexity_ours": evaluation.perplexity.value,
        "perplexity_llama_cpp": theirs,
        "relative_difference": theirs / evaluation.perplexity.value - 1,
        "largest_difference_of_a_window": max(gaps),
        "perplexity_ours_with_inputs_rounded": so,
        "relative_difference_with_inputs_rounded": theirs / so - 1,
        "same_answer_with_inputs_rounded": answer_so == reply["answer"],
        "nll_per_window_llama_cpp": reply["nll_per_window"],
        "answer_ours": tokenizer.decode(ours),
        "answer_llama_cpp": tokenizer.decode(reply["answer"]),
        "same_answer": ours == reply["answer"],
        "same_tokens_of_the_answer": len(ours) if same is None else same,
        "same_tokens_of_the_text": reply["tokens"] == request["tokens"],
    }


def verdicts(compared: dict[str, Any]) -> dict[str, Any]:
    """Hold the figures against the targets."""
    others = [name for name, found in compared.items() if not found["same_answer"]]
    others_so = [name for name, found in compared.items() if not found["same_answer_with_inputs_rounded"]]
    cut = [name for name, found in compared.items() if not found["same_tokens_of_the_text"]]
    return {
        "perplexity equal to our evaluation of the same file": _close(compared, "relative_difference"),
        "perplexity equal to our evaluation with inputs rounded as there": _close(
            compared, "relative_difference_with_inputs_rounded"
        ),
        "same greedy text": {"different": others, "passed": not others},
        "same greedy text with inputs rounded as there": {"different": others_so, "passed": not others_so},
        "same tokens of the held-out text": {"different": cut, "passed": not cut},
    }


def _close(compared: dict[str, Any], key: str) -> dict[str, Any]:
    gaps = {name: abs(found[key]) for name, found in compared.items()}
    worst = max(gaps, key=lambda name: gaps[name])
    found = {"limit": MOST_DIFFERENCE, "worst": worst, "relative_difference": gaps[worst]}
    return found | {"passed": gaps[worst] <= MOST_DIFFERENCE}


def show(arms: dict[str, Any], compared: dict[str, Any], evaluations: dict[str, Any]) -> str:
    header = [
        "type",
        "MB",
        "perplexity",
        "in llama.cpp",
        "difference",
        "inputs rounded",
        "KL",
        "same text",
        "export, s",
        "GiB",
    ]
    rows = []
    for name, found in compared.items():
        rows.append(
            [
                name,
                f"{arms[name]['bytes'] / 1e6:.1f}",
                f"{found['perplexity_ours']:.3f}",
                f"{found['perplexity_llama_cpp']:.3f}",
                f"{found['relative_difference']:+.3%}",
                f"{found['relative_difference_with_inputs_rounded']:+.3%}",
                f"{evaluations[name].kl.value:.4f}",
                "yes" if found["same_answer"] else f"{found['same_tokens_of_the_answer']} tokens",
                f"{arms[name]['export']['seconds']:.0f}",
                f"{arms[name]['export']['peak_anonymous_bytes'] / GIB:.2f}",
            ]
        )
    return table(header, rows)


def main() -> None:
    parser = common.options(__doc__)
    peers.add_option(parser)
    args = parser.parse_args()
    about = facts()
    setting = common.given(args)
    names = common.pick(list(ARMS), args.only)
    python = peers.peer_python("llama_cpp", args.envs)
    with common.kept_folder(args.work) as work:
        place = {"work": Path(work), "python": python, "request": Path(work) / "request.json"}
        request = write_request(setting, place["request"])
        files, arms = {}, {}
        for name in names:
            files[name], arms[name] = run_arm(name, place, setting)
        evaluations = common.evaluate_folders(setting, files, common.MODEL)
        compared = {name: compare(evaluations[name], arms[name], files[name], request) for name in names}
    content = {
        "benchmark": "gguf_llama_cpp",
        "facts": about,
        "setting": setting.facts() | {"prompt": PROMPT, "answer_tokens": ANSWER_TOKENS},
        "peer": peers.versions("llama_cpp", python),
        "arms": {
            name: {"options": ARMS[name].__dict__, **arms[name], **compared[name]}
            | {"evaluation": evaluations[name].model_dump(mode="json")}
            for name in names
        },
        "verdicts": verdicts(compared),
    }
    path = write_result("gguf_llama_cpp", content)
    print(f"\n{show(arms, compared, evaluations)}\n")
    show_verdicts(content["verdicts"], path)


if __name__ == "__main__":
    main()
