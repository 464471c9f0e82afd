"""The peer's side: AutoRound on one model folder, run in an environment without FrugalLM.

Prints ``{"event": "stage", "text": …}`` lines on standard error, so that whoever started it can tell loading,
compressing and saving apart. Reads calibration tokens from a safetensors file with ``input_ids`` (samples, length). What
it writes is the GPTQ layout under AutoRound's own name; the configuration is made to say so, for readers of that layout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

#: Its recipes: rounds of training per block, and the learning rate (``None``: one over the rounds).
RECIPES = {"light": (50, 5e-3), "default": (200, None)}
#: What it calls its layouts to what GPTQ calls them: symmetric grids store zero points less one, others as they are.
LAYOUTS = {"auto_round:auto_gptq": "gptq", "auto_round": "gptq_v2"}


def stage(text: str) -> None:
    print(json.dumps({"event": "stage", "text": text}), file=sys.stderr, flush=True)


def call_it_gptq(folder: Path) -> None:
    """Change the name of the quantization method to that of the layout in which the tensors are."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    settings = config["quantization_config"]
    if settings["packing_format"] not in LAYOUTS or settings.get("extra_config"):
        raise SystemExit(f"AutoRound wrote what is not read here: {settings}")
    kept = {key: settings[key] for key in ("bits", "group_size", "sym")}
    config["quantization_config"] = {
        "quant_method": "gptq",
        "checkpoint_format": LAYOUTS[settings["packing_format"]],
        **kept,
    }
    file.write_text(json.dumps(config, indent=2))
    (folder / "quantization_config.json").unlink(missing_ok=True)


def store_in_16_bits(folder: Path) -> None:
    """Write what is not quantized in bf16, half of what AutoRound saves after it computed in float32."""
    import torch
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        floats = {name: t.to(torch.bfloat16) for name, t in tensors.items() if t.dtype == torch.float32}
        save_file(tensors | floats, file, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="dense Hugging Face folder")
    parser.add_argument("--tokens", required=True, help="safetensors file with the calibration tokens")
    parser.add_argument("--out", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--asymmetric", action="store_true", help="zero points")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="default")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    stage("import")
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    stage("load")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = load_file(args.tokens)["input_ids"]
    rounds, rate = RECIPES[args.recipe]

    stage("compress")
    tuned = AutoRound(
        model,
        tokenizer,
        bits=args.bits,
        group_size=args.group_size,
        sym=not args.asymmetric,
        dataset=list(tokens.split(8)),
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=8,
        iters=rounds,
        lr=rate,
        device_map="cpu",
        enable_torch_compile=False,
        seed=0,
    )
    tuned.quantize_and_save(args.out, format="auto_round")
    stage("save")
    [written] = [file.parent for file in Path(args.out).rglob("config.json")]
    if written != Path(args.out):  # it may put a folder of its own into the one asked for
        for file in written.iterdir():
            file.rename(Path(args.out) / file.name)
        written.rmdir()
    store_in_16_bits(Path(args.out))
    call_it_gptq(Path(args.out))


if __name__ == "__main__":
    main()
