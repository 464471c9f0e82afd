"""Whole files of about 105, 90 and 75 MB: our best recipe without training against peers at no fewer bytes.

Several recipes of ours meet each size. One of them is chosen by its KL on windows of the calibration text that nothing is
calibrated with; the others are never measured on the text of the figures. A peer is held against it if its file is no smaller
and at most 3 % larger; where there is none of some toolkit, the result says so. Every toolkit is represented by its best
file in range.

Peers: llama.cpp's types, written by llama.cpp itself, with and without an importance matrix of our calibration windows,
and by ``frugal export``; llm-compressor, HQQ and AutoRound, which keep the table of the vocabulary in 16 bits. Files for
llama.cpp are read by our evaluator, with unrounded inputs. Their vocabulary is not counted among the bytes that are
compared, since folders have it in another file.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
import setting as common
from harness import Measurement, facts, frugal, measure, table, write_result

if TYPE_CHECKING:
    from frugallm.evaluate import Evaluation
    from frugallm.models.checkpoint import Checkpoint

HERE = Path(__file__).parent
#: Nominal size to what our file may take, in bytes: as much as the smallest peer that is meant.
SIZES = {105: 102_900_000, 90: 89_000_000, 75: 75_700_000}
RANGE = 0.03
CHOICE_WINDOWS = 32
OURS, LLAMA_CPP, LLM_COMPRESSOR, HQQ, AUTO_ROUND = (
    "frugallm",
    "llama.cpp",
    "llm-compressor",
    "hqq",
    "autoround",
)
#: Who made a file, by the first word of its arm, as one toolkit; types of llama.cpp count as its own, whoever wrote them.
TOOLKITS = {
    "llama.cpp": LLAMA_CPP,
    "gguf": LLAMA_CPP,
    "llm-compressor": LLM_COMPRESSOR,
    "hqq": HQQ,
    "autoround": AUTO_ROUND,
}
#: Toolkit to the name of its environment in :mod:`peers`.
ENVIRONMENTS = {LLAMA_CPP: "llama_cpp", LLM_COMPRESSOR: "llmcompressor", HQQ: "hqq", AUTO_ROUND: "auto_round"}
#: Bytes of the model's table (49,152 x 576), by bits: codes and bf16 scales; a rotated model has two.
TABLES = {8: 28_409_856, 6: 22_118_416, 5: 18_579_472, 4: 15_040_512}
#: What else is in a file: norms in bf16, names and places of its tensors.
REST = 300_000

NOTES = {
    "range": RANGE,
    "choice": f"least KL on windows of {common.CALIBRATION} that nothing is calibrated with",
    "added": "recipes of ours with tables in 5 and 6 bits, after a first run without them had missed at 75 MB",
    "autoround": "its light recipe: 50 rounds a block, learning rate 0.005",
}


@dataclass(frozen=True)
class Arm:
    """One way to a file: steps of ours, or the options of a peer's script, of ``frugal export`` for ``gguf``."""

    options: tuple[str, ...]
    size: int | None = None  # nominal, of ours


def budget(size: int, bits: int, count: int = 1) -> str:
    """Return in megabytes what is left for linears beside so many tables of so many bits."""
    return f"{(SIZES[size] - REST - count * TABLES[bits]) / 1e6:.2f}"


def recipes(size: int) -> dict[str, tuple[str, ...]]:
    """Return the recipes of ours that meet a size."""
    eight, four, two = budget(size, 8), budget(size, 4), budget(size, 4, 2)
    g = "group_size=64"
    return {
        "mixed gptq": (f"mixed_bits:megabytes={eight}", f"gptq:{g}", "embedding"),
        "mixed gptaq": (f"mixed_bits:megabytes={eight}", f"gptaq:{g}", "embedding"),
        "mixed awq gptq": (f"mixed_bits:megabytes={eight}", f"awq:{g}", f"gptq:{g}", "embedding"),
        "mixed gptq, table in 4 bits": (f"mixed_bits:megabytes={four}", f"gptq:{g}", "embedding:bits=4"),
        **{
            f"mixed {solver}, table in {bits} bits": (
                f"mixed_bits:megabytes={budget(size, bits)}",
                f"{solver}:{g}",
                f"embedding:bits={bits}",
            )
            for solver in ("gptq", "gptaq")
            for bits in (5, 6)
        },
        "mixed gptaq, table in 4 bits": (f"mixed_bits:megabytes={four}", f"gptaq:{g}", "embedding:bits=4"),
        "rotate mixed gptq, tables in 4 bits": (
            "rotate",
            f"mixed_bits:megabytes={two}",
            f"gptq:{g}",
            "embedding:bits=4",
        ),
    }


def _llama_cpp() -> dict[str, Arm]:
    """Return types of llama.cpp that come near one of the sizes, with the table in the type that they leave room for.

    All have an importance matrix; those that it offers by itself are there without one as well.
    """
    plain = {
        "Q5_0": ("Q5_0", "Q8_0"),
        "Q4_K_M": ("Q4_K_M", "Q8_0"),
        "Q4_0": ("Q4_0", "Q8_0"),
        "IQ4_NL": ("IQ4_NL", "Q8_0"),
        "Q4_0, table in Q4_0": ("Q4_0", "Q4_0"),
        "IQ4_NL, table in Q4_0": ("IQ4_NL", "Q4_0"),
    }
    composed = {
        "IQ4_NL, down in Q8_0": ("IQ4_NL", "Q8_0", "ffn_down=Q8_0"),
        "IQ4_NL, down in Q8_0, table in Q4_0": ("IQ4_NL", "Q4_0", "ffn_down=Q8_0"),
        "Q5_0, table in Q4_0": ("Q5_0", "Q4_0"),
        "IQ4_NL, table in IQ4_NL": ("IQ4_NL", "IQ4_NL"),
        "Q3_K_S, table in Q5_0": ("Q3_K_S", "Q5_0"),
        "Q3_K_M, table in Q4_0": ("Q3_K_M", "Q4_0"),
    }
    found = {}
    for name, (kind, tables, *tensors) in {**plain, **composed}.items():
        options = (f"--type={kind}", f"--tables={tables}", *(f"--tensor={one}" for one in tensors))
        if name in plain:
            found[f"llama.cpp {name}"] = Arm(options)
        found[f"llama.cpp {name}, imatrix"] = Arm((*options, "--importance"))
    return found


def _gguf(kind: str, tables: str) -> Arm:
    return Arm((f"--to=gguf:{kind}", f"--tables={tables}"))


def _llm_compressor(bits: int) -> dict[str, Arm]:
    # Computed in float32, which is its best, and saved with 16 bits for what is not quantized.
    fixed = ("--group-size=32", f"--bits={bits}", "--save-dtype=bfloat16")
    return {
        f"llm-compressor gptq W{bits}, groups of 32, {words}": Arm((*fixed, *options))
        for words, options in {
            "imatrix": ("--observer=imatrix_mse",),
            "mse": ("--observer=memoryless_mse",),
            "imatrix, asymmetric": ("--observer=imatrix_mse", "--asymmetric"),
        }.items()
    }


def _auto_round(bits: int) -> dict[str, Arm]:
    # Its light recipe: 50 rounds a block. The default's 200 take four times as long.
    fixed = ("--group-size=32", f"--bits={bits}", "--recipe=light")
    return {
        f"autoround W{bits}, groups of 32": Arm(fixed),
        f"autoround W{bits}, groups of 32, asymmetric": Arm((*fixed, "--asymmetric")),
    }


ARMS: dict[str, Arm] = {
    **{f"frugallm {s} MB {n}": Arm(steps, s) for s in SIZES for n, steps in recipes(s).items()},
    **_llama_cpp(),
    "gguf Q5_0 imatrix": _gguf("Q5_0", "Q8_0"),
    "gguf IQ4_NL imatrix": _gguf("IQ4_NL", "Q8_0"),
    "gguf Q4_0 imatrix": _gguf("Q4_0", "Q8_0"),
    "gguf IQ4_NL imatrix, table in IQ4_NL": _gguf("IQ4_NL", "IQ4_NL"),
    **_llm_compressor(3),
    **_llm_compressor(2),
    "hqq W3, groups of 64": Arm(("--bits=3", "--group-size=64")),
    "hqq W3, groups of 64, slow": Arm(("--bits=3", "--group-size=64", "--slow")),
    "hqq W2, groups of 64": Arm(("--bits=2", "--group-size=64")),
    "hqq W2, groups of 64, slow": Arm(("--bits=2", "--group-size=64", "--slow")),
    **_auto_round(3),
    **_auto_round(2),
}


def maker(name: str) -> str:
    """Return the first word of an arm: who writes its file."""
    return name.split()[0]


def command(name: str, place: Mapping[str, Any], out: Path, setting: common.Setting) -> list[str | Path]:
    """Return the process that writes the file or folder of an arm."""
    options, who = ARMS[name].options, maker(name)
    if who == OURS:
        return frugal("run", place["model"], *options, "--out", out, *setting.run_options())
    if who == "gguf":
        text = [f"--text={setting.data / common.CALIBRATION}", f"--seed={setting.seed}"]
        text += [f"--samples={setting.samples}", f"--seq-len={setting.seq_len}"]
        return frugal("export", common.MODEL, "--out", out, *options, "--imatrix", *text)
    script = {
        LLAMA_CPP: "peer_llama_cpp_quantize.py",
        LLM_COMPRESSOR: "peer_llmcompressor.py",
        HQQ: "peer_hqq.py",
        AUTO_ROUND: "peer_auto_round.py",
    }[who]
    model = place["gguf"] if who == LLAMA_CPP else place["model"]
    files: list[str | Path] = ["--model", model, "--out", out, f"--threads={setting.threads}"]
    if who in (LLM_COMPRESSOR, AUTO_ROUND):
        files += ["--tokens", place["tokens"]]
    given = [o if o != "--importance" else f"--importance={place['importance']}" for o in options]
    return [place["pythons"][who], HERE / script, *files, *given]


def whole_gguf(setting: common.Setting, file: Path) -> Path:
    """Write the model unquantized as GGUF, from which llama.cpp starts."""
    if not file.exists():
        run = frugal("export", common.MODEL, "--to=gguf:F32", "--out", file)
        measure(run, threads=setting.threads, log=file.with_suffix(".log"))
    return file


def importance(model: Path, tokens: Path, file: Path, threads: int) -> Path:
    """Write the mean squares of what every tensor's input channels hold, over the calibration windows, as ``.npz``."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from frugallm.formats.gguf_writer import make_layout
    from frugallm.models.open import open_checkpoint
    from frugallm.walk.importance import channel_importance

    if not file.exists():
        torch.set_num_threads(threads)
        checkpoint = open_checkpoint(model)
        found = channel_importance(checkpoint, load_file(tokens)["input_ids"])
        named = {e.name: e.sources[0] for e in make_layout(checkpoint, "F32").entries if e.sources}
        np.savez(file, **{name: found[source].numpy() for name, source in named.items() if source in found})
    return file


def file_facts(name: str, out: Path) -> dict[str, Any]:
    """Return what is stored: bytes of the weight files, bytes that are compared, and types of a GGUF file's tensors."""
    if out.suffix == ".gguf":
        from frugallm.models.gguf_reader import GGUFData

        tensors = GGUFData(out).tensors.values()
        kinds = Counter(t.kind.name for t in tensors if len(t.shape) > 1)
        return {
            "weights_bytes": out.stat().st_size,
            "compared_bytes": sum(t.row_count * t.row_bytes for t in tensors),
            "types": dict(kinds.most_common()),
        }
    stored = out / "stored.json"  # a dense folder of values that something smaller stands for
    size = json.loads(stored.read_text())["weights_bytes"] if stored.is_file() else common.folder_bytes(out)
    return {"weights_bytes": size, "compared_bytes": size}


def run_arm(name: str, place: Mapping[str, Any], setting: common.Setting, *, resume: bool) -> dict[str, Any]:
    """Make the file of an arm, or take it as an earlier run left it, and return what it took."""
    out, record = place["files"][name], place["files"][name].with_suffix(".run.json")
    if resume and record.is_file() and out.exists():
        return json.loads(record.read_text())
    for old in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    run = measure(command(name, place, out, setting), threads=setting.threads, log=out.with_suffix(".log"))
    took = {"options": list(ARMS[name].options), **cost(run), **file_facts(name, out)}
    record.write_text(json.dumps(took))
    kinds = "".join(f", {count} {kind}" for kind, count in took.get("types", {}).items())
    print(f"{name}: {run.seconds:.0f} s, {took['compared_bytes'] / 1e6:.2f} MB{kinds}", flush=True)
    return took


def cost(run: Measurement) -> dict[str, Any]:
    return {"seconds": run.seconds, "peak_anonymous_bytes": run.peak_anonymous_bytes}


def readable(name: str, out: Path) -> Path | Checkpoint:
    """Return what the evaluator takes: plain transformers does not load packed zero points, so they are decoded here."""
    from frugallm.formats.decoded import Decoded

    return Decoded(out) if maker(name) == LLM_COMPRESSOR and "--asymmetric" in ARMS[name].options else out


def evaluated(
    judge: common.Judge, files: Mapping[str, Path], folder: Path, *, resume: bool
) -> dict[str, Evaluation]:
    """Evaluate file after file; what is found is kept in ``folder``, and taken from there with ``resume``."""
    from frugallm.evaluate import Evaluation

    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, file in files.items():
        kept = folder / f"{file.name}.json"
        if not (resume and kept.is_file()):
            one = judge.evaluate({name: readable(name, file)})[name]
            kept.write_text(one.model_dump_json())
            print(f"{name}: KL {one.kl.value:.4f}, {one.seconds:.0f} s", flush=True)
        found[name] = Evaluation.model_validate_json(kept.read_text())
    return found


def choose(kl: Mapping[str, float], runs: Mapping[str, Any]) -> dict[int, str]:
    """Return our arm of each size: the one with the least KL of those whose file is small enough."""
    found: dict[int, str] = {}
    for name in sorted(kl, key=kl.__getitem__):
        size = ARMS[name].size
        if size is not None and runs[name]["compared_bytes"] <= SIZES[size]:
            found.setdefault(size, name)
    return found


def in_range(ours: str, runs: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the toolkits that ran with their arms that are no smaller than ours and at most 3 % larger."""
    least = runs[ours]["compared_bytes"]
    found: dict[str, list[str]] = {}
    for name, run in runs.items():
        if ARMS[name].size is None:
            arms = found.setdefault(TOOLKITS[maker(name)], [])
            if least <= run["compared_bytes"] <= (1 + RANGE) * least:
                arms.append(name)
    return found


def verdicts(
    chosen: Mapping[int, str], runs: Mapping[str, Any], evaluations: Mapping[str, Evaluation]
) -> tuple[dict[str, Any], list[str]]:
    """Hold ours against the best file of each toolkit; also return where there is no peer."""
    found: dict[str, Any] = {}
    alone = []
    for size, ours in chosen.items():
        for toolkit, arms in in_range(ours, runs).items():
            if not arms:
                alone.append(f"{size} MB: {toolkit}")
            for words, key, figure, limit in (
                ("KL", "kl_difference", "kl", 0.0),
                ("perplexity", "perplexity_ratio", "perplexity", 1.0),
            ):
                if arms:
                    best = min(arms, key=lambda name: getattr(evaluations[name], figure).value)
                    gap = common.compare(evaluations[ours], evaluations[best])[key]
                    high = gap["high"]
                    bytes_ = {
                        "bytes": runs[ours]["compared_bytes"],
                        "peer_bytes": runs[best]["compared_bytes"],
                    }
                    passed = high is not None and high < limit
                    found[f"{size} MB: {words} below {toolkit}'s at no fewer bytes"] = {
                        "ours": ours,
                        "peer": best,
                        **gap,
                        **bytes_,
                        "passed": passed,
                    }
    return found, alone


def show(runs: Mapping[str, Any], evaluations: Mapping[str, Evaluation], base: float) -> str:
    """Return the Markdown table of what was evaluated, the smallest first."""
    header = ["arm", "MB", "compared MB", "KL (nats/token)", "perplexity", "time (s)"]
    rows = [["unquantized", "", "", "", f"{base:.2f}", ""]]
    for name in sorted(evaluations, key=lambda one: runs[one]["compared_bytes"]):
        run, e = runs[name], evaluations[name]
        sizes = [f"{run[key] / 1e6:.2f}" for key in ("weights_bytes", "compared_bytes")]
        figures = [f"{e.kl.value:.4f}", f"{e.perplexity.value:.2f}", f"{run['seconds']:.0f}"]
        rows.append([name, *sizes, *figures])
    return table(header, rows)


def show_choice(runs: Mapping[str, Any], kl: Mapping[str, float], chosen: Mapping[int, str]) -> str:
    """Return the Markdown table of our recipes, the chosen ones in bold."""
    rows = []
    for name, found in kl.items():
        words = f"**{name}**" if name in chosen.values() else name
        size, limit = runs[name]["compared_bytes"] / 1e6, SIZES[ARMS[name].size or 0] / 1e6
        rows.append([words, f"{size:.2f}", f"{limit:.2f}", f"{found:.4f}", f"{runs[name]['seconds']:.0f}"])
    return table(["recipe", "MB", "at most", "KL to choose by (nats/token)", "time (s)"], rows)


def main() -> None:
    parser = common.options(__doc__)
    peers.add_option(parser)
    parser.add_argument("--choice-windows", type=int, default=CHOICE_WINDOWS, help="windows to choose by")
    args = parser.parse_args()
    about = facts()
    setting = common.given(args)
    names = common.pick(list(ARMS), args.only)
    toolkits = {maker(n) for n in names} & set(ENVIRONMENTS)
    pythons = {who: peers.peer_python(ENVIRONMENTS[who], args.envs) for who in sorted(toolkits)}
    with common.kept_folder(args.work) as kept:
        work = Path(kept)
        model = common.dense_folder(work / "dense")
        tokens = common.calibration_tokens(setting, model, work / "tokens.safetensors")
        place: dict[str, Any] = {"model": model, "tokens": tokens, "pythons": pythons}
        if LLAMA_CPP in toolkits:
            place["gguf"] = whole_gguf(setting, work / "whole.gguf")
            place["importance"] = importance(model, tokens, work / "importance.npz", args.threads)
        place["files"] = {n: work / file_name(n) for n in names}
        runs = {n: run_arm(n, place, setting, resume=args.resume) for n in names}
        candidates = {n: place["files"][n] for n in names if ARMS[n].size is not None}
        looked = {}
        if candidates:
            judge = common.Judge(setting, model, spare=args.choice_windows)
            looked = evaluated(judge, candidates, work / "choice", resume=args.resume)
        kl = {n: one.kl.value for n, one in looked.items()}
        chosen = choose(kl, runs)
        judged = {n: place["files"][n] for n in names if ARMS[n].size is None or n in chosen.values()}
        judge = common.Judge(setting, model)
        evaluations = evaluated(judge, judged, work / "figures", resume=args.resume)
    found, alone = verdicts(chosen, runs, evaluations)
    base = math.exp(statistics.fmean(judge.reference.nll))
    content = {
        "benchmark": "file_sizes",
        "facts": about,
        "setting": setting.facts()
        | {"choice_windows": args.choice_windows, "largest_bytes_of_ours": SIZES}
        | NOTES,
        "peer": {who: peers.versions(ENVIRONMENTS[who], python) for who, python in pythons.items()},
        "unquantized_perplexity": base,
        "recipes": {n: runs[n] | {"choice_kl": kl[n], "chosen": n in chosen.values()} for n in kl},
        "arms": {n: runs[n] | {"evaluation": e.model_dump(mode="json")} for n, e in evaluations.items()},
        "verdicts": found,
        "without_peer": alone,
    }
    path = write_result("file_sizes", content)
    print(f"\n{show_choice(runs, kl, chosen)}\n\n{show(runs, evaluations, base)}\n")
    for text, verdict in found.items():
        print(f"- {'PASS' if verdict['passed'] else 'FAIL'}: {text} ({verdict})")
    for text in alone:
        print(f"- no peer: {text}")
    print(f"\nWritten to {path}.")


def file_name(name: str) -> str:
    """Return the name of an arm's file or folder."""
    stem = name.replace(",", "").replace(" ", "-").replace("llama.cpp", "llama_cpp")
    return f"{stem}.gguf" if TOOLKITS.get(maker(name)) == LLAMA_CPP else stem


if __name__ == "__main__":
    main()
