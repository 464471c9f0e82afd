"""The peer's side: the ``hqq`` package on one model folder, run in an environment without FrugalLM.

Prints ``{"event": "stage", "text": …}`` lines on standard error, so that whoever started it can tell loading,
compressing and saving apart. The folder it writes is dense float32 and holds the values that HQQ's codes stand for, as
its own layer computes them in float16. ``stored.json`` in it says what the weights take as HQQ's layers hold them:
packed codes, and 16 bits for scales, zero points and everything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def stage(text: str) -> None:
    print(json.dumps({"event": "stage", "text": text}), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="dense Hugging Face folder")
    parser.add_argument("--out", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--slow", action="store_true", help="its optimizer without early stopping")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    stage("import")
    import torch
    from hqq.core.optimize import optimize_weights_proximal_slow
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    stage("load")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.slow:
        Quantizer.optimize_weights = optimize_weights_proximal_slow

    stage("compress")
    config = BaseQuantizeConfig(nbits=args.bits, group_size=args.group_size, axis=1)
    stored = 2 * sum(parameter.numel() for parameter in model.parameters())  # tied ones count once
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            layer = HQQLinear(
                module, config, compute_dtype=torch.float16, device="cpu", del_orig=False, initialize=True
            )
            value = layer.dequantize()
            if value.shape != module.weight.shape or not value.isfinite().all():
                raise SystemExit(f"{name}: HQQ gives {tuple(value.shape)} or values that are not finite")
            halves = layer.meta["scale"].numel() + layer.meta["zero"].numel() - module.weight.numel()
            stored += layer.W_q.numel() * layer.W_q.element_size() + 2 * halves
            module.weight.data = value.float()
    stage("save")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (Path(args.out) / "stored.json").write_text(json.dumps({"weights_bytes": stored}))


if __name__ == "__main__":
    main()
