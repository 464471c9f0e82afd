"""The other side: one folder in vLLM or in plain transformers, run in an environment without FrugalLM.

Reads a request (JSON: ``prompts`` and ``text`` as token ids, ``answer_tokens``, ``ends``), writes a reply (JSON): for every
prompt the greedy continuation, for every token of it by how much its log-probability leads the second, and the
log-probability of every token of the text after the first (nats). Prints ``{"event": "stage", "text": …}`` lines on
standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def stage(text: str) -> None:
    print(json.dumps({"event": "stage", "text": text}), file=sys.stderr, flush=True)


def with_vllm(folder: str, dtype: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return what vLLM answers and finds likely."""
    from vllm import LLM, SamplingParams

    longest = max(len(ids) for ids in (*request["prompts"], request["text"])) + request["answer_tokens"]
    stage("load")
    model = LLM(folder, dtype=dtype, max_model_len=longest, max_num_seqs=1, enforce_eager=True)
    stage("generate")
    greedy = SamplingParams(
        temperature=0, max_tokens=request["answer_tokens"], logprobs=2, stop_token_ids=request["ends"]
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    found = []
    for reply in model.generate(prompts, greedy):
        [one] = reply.outputs
        ranked = [sorted((p.logprob for p in step.values()), reverse=True) for step in one.logprobs]
        found.append({"tokens": list(one.token_ids), "leads": [two[0] - two[1] for two in ranked]})
    stage("score")
    once = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    [reply] = model.generate([{"prompt_token_ids": request["text"]}], once)
    known = zip(reply.prompt_logprobs[1:], request["text"][1:], strict=True)
    return {"answers": found, "logprobs": [step[token].logprob for step, token in known]}


def with_transformers(folder: str, dtype: str, request: dict[str, Any], threads: int) -> dict[str, Any]:
    """Return what plain transformers answers and finds likely."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    stage("load")
    # A type that no folder is loaded in: the same values, with sums in float64.
    double = dtype == "float64"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32" if double else dtype)
    if double:
        model = model.double()
    stage("generate")
    found = []
    for prompt in request["prompts"]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=request["answer_tokens"],
            eos_token_id=request["ends"],
            pad_token_id=request["ends"][0],
            return_dict_in_generate=True,
            output_logits=True,
        )
        ranked = [step[0].float().log_softmax(-1).topk(2).values for step in out.logits]
        tokens = out.sequences[0, len(prompt) :].tolist()
        found.append({"tokens": tokens, "leads": [float(two[0] - two[1]) for two in ranked]})
    stage("score")
    ids = torch.tensor([request["text"]])
    with torch.inference_mode():
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
    return {"answers": found, "logprobs": logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("vllm", "transformers"), required=True)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--request", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    request = json.loads(args.request.read_text())
    stage("import")
    if args.engine == "vllm":
        reply = with_vllm(args.model, args.dtype, request)
    else:
        reply = with_transformers(args.model, args.dtype, request, args.threads)
    args.out.write_text(json.dumps(reply))


if __name__ == "__main__":
    main()
