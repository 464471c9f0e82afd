"""Load a model folder as anybody would, without FrugalLM, and say what it does.

Run as a script in a process of its own: ``python -I outside.py REQUEST.json ANSWER.safetensors``. It imports only torch,
safetensors and transformers. The request names the folder, token ids and what to measure; the answer holds logits and the
output of every block, and, in its metadata, timings, memory and generated text.
"""

import contextlib
import json
import os
import sys
import time
from typing import Any


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process in bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def median(values: list) -> float:
    """Return the middle value."""
    return sorted(values)[len(values) // 2]


def watch_blocks(model: Any, outputs: list[Any]) -> list[Any]:
    """Record the output of every decoder block of the next forward."""
    layers = next(
        m for n, m in model.named_modules() if n.endswith(("layers", "h")) and hasattr(m, "__len__")
    )
    keep = lambda _, __, out: outputs.append((out[0] if isinstance(out, tuple) else out).float())  # noqa: E731
    return [layer.register_forward_hook(keep) for layer in layers]


def decode_in(model: Any, dtype: Any) -> None:
    """Decode the weights of a model in the compressed-tensors format now, and take them to ``dtype``.

    It would decode at the first call; FP4 it decodes to bf16, whatever type the model was to be loaded in.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        compressor.decompress_model(model)
        model.to(dtype)


def measure_speed(model: Any, ids: Any, decode: int, runs: int) -> dict[str, Any]:
    """Return tokens per second of prefill and decode with plain ``generate`` machinery, each run's value."""
    import torch

    prefill, decoding = [], []
    for _ in range(runs):
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefill.append(ids.shape[1] / (time.perf_counter() - start))
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(decode):
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        decoding.append(decode / (time.perf_counter() - start))
    return {"prefill": prefill, "decode": decoding, "threads": torch.get_num_threads()}


def main(request_file: str, answer_file: str) -> None:
    """Carry out the request."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with open(request_file) as file:
        request = json.load(file)
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(request["threads"])
    tensors: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    tokenizer = AutoTokenizer.from_pretrained(request["folder"])
    for label, dtype in request["dtypes"].items():
        start = time.perf_counter()
        kwargs = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        model = AutoModelForCausalLM.from_pretrained(request["folder"], **kwargs).eval()
        if dtype is not None:
            decode_in(model, getattr(torch, dtype))
        ids = torch.tensor(request["ids"])
        with torch.inference_mode():
            outputs: list = []
            hooks = watch_blocks(model, outputs)
            tensors[f"{label}.logits"] = model(ids).logits.float().contiguous()
            facts[f"{label}.load_seconds"] = time.perf_counter() - start
            for i, out in enumerate(outputs):
                tensors[f"{label}.block.{i}"] = out.contiguous()
            for hook in hooks:
                hook.remove()
            facts[f"{label}.dtype"] = str(model.dtype)
            if label == "default" and request.get("speed"):
                speed_ids = torch.tensor(request["speed"]["ids"])
                facts["speed"] = measure_speed(
                    model, speed_ids, request["speed"]["decode"], request["speed"]["runs"]
                )
            if label == "default" and request.get("prompt"):
                facts["answer"] = answer(model, tokenizer, request["prompt"], request["answer_tokens"])
            facts[f"{label}.anonymous_bytes"] = anonymous_bytes()
        del model
    save_file(tensors, answer_file, metadata={"facts": json.dumps(facts)})


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Return the greedy answer to one prompt, through the chat template where there is one."""
    text, special = prompt, True
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        text, special = (
            tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True),
            False,
        )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(*sys.argv[1:3])
