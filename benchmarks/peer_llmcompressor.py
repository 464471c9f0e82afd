"""The peer's side: llm-compressor on one model folder, run in an environment without FrugalLM.

Prints ``{"event": "stage", "text": …}`` lines on standard error, so that whoever started it can tell
loading, compressing and saving apart. Reads calibration tokens from a safetensors file with ``input_ids``
(samples, length).
"""

from __future__ import annotations

import argparse
import json
import sys

OBSERVERS = ("memoryless_minmax", "memoryless_mse", "imatrix_mse")


def stage(text: str) -> None:
    print(json.dumps({"event": "stage", "text": text}), file=sys.stderr, flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="dense Hugging Face folder")
    parser.add_argument("--tokens", required=True, help="safetensors file with the calibration tokens")
    parser.add_argument("--out", required=True)
    parser.add_argument("--method", choices=("gptq", "rtn", "awq", "wanda", "sparsegpt"), default="gptq")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of wanda and sparsegpt")
    parser.add_argument("--mask", default="0:0", help="of wanda and sparsegpt: n:m, or 0:0 for anywhere")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true", help="zero points")
    parser.add_argument("--duo-scaling", choices=("true", "false", "both"), default="true", help="of awq")
    parser.add_argument("--actorder", choices=("static", "none"), default="static")
    parser.add_argument("--observer", choices=OBSERVERS, default=OBSERVERS[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--save-dtype", choices=("float32", "bfloat16"), help="of embedding, norms and scales"
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dampening", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def modifier(args: argparse.Namespace) -> object:
    return pruning(args) if args.method in ("wanda", "sparsegpt") else quantization(args)


def pruning(args: argparse.Namespace) -> object:
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    # Targets are the blocks; every linear inside is pruned. Embedding and head are not.
    shared = {
        "sparsity": args.sparsity,
        "mask_structure": args.mask,
        "targets": [r"re:model\.layers\.\d+$"],
        "ignore": ["re:.*lm_head"],
    }
    if args.method == "wanda":
        return WandaPruningModifier(**shared)
    return SparseGPTModifier(**shared, dampening_frac=args.dampening)


def quantization(args: argparse.Namespace) -> object:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = {
        "num_bits": args.bits,
        "type": "int",
        "symmetric": not args.asymmetric,
        "strategy": "group",
        "group_size": args.group_size,
        "observer": args.observer,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rounding = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    if args.method == "rtn":
        return rounding
    if args.method == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        duo = {"true": True, "false": False, "both": "both"}[args.duo_scaling]
        return [AWQModifier(duo_scaling=duo), rounding]
    return GPTQModifier(
        config_groups=groups,
        ignore=["lm_head"],
        actorder=None if args.actorder == "none" else args.actorder,
        dampening_frac=args.dampening,
    )


def main() -> None:
    args = options()
    stage("import")
    import datasets
    import torch
    from llmcompressor import oneshot
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    if not torch.accelerator.is_available():
        # Its AWQ pins memory for copies to a GPU, which without one is an error and would change nothing.
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
    stage("load")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = load_file(args.tokens)["input_ids"]
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}

    stage("compress")
    # Rounding with a plain observer looks at no data; imatrix does.
    calibrated = args.method != "rtn" or args.observer == "imatrix_mse"
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=modifier(args),
        dataset=datasets.Dataset.from_dict(rows) if calibrated else None,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        batch_size=args.batch_size,
    )
    stage("save")
    if args.save_dtype:  # weights are still values on their grids here, and packed when they are saved
        model.to(getattr(torch, args.save_dtype))
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
