"""Every family as GGUF in llama.cpp: are the logits those of transformers?

A tiny random model of each family, with what a family may be configured to, is written as GGUF F32 and read by llama.cpp, in
an environment of its own. Both compute the logits of the same 48 random tokens in float32. llama.cpp takes GELU from a table
in float16, which alone moves logits by some thousandths in Gemma 3, GPT-2 and GPT-NeoX.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import peers
import setting as common
from harness import facts, table, write_result

HERE = Path(__file__).parent
MOST_DIFFERENCE = 1e-3  # of the largest logit
TOKENS, CONTEXT = 48, 256

LLAMA: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
OLMOE = LLAMA | EXPERTS | {"num_experts": 4, "num_key_value_heads": 4}
GEMMA = LLAMA | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1 + 0.3 * place for place in range(8)],
    "short_factor": [1 + 0.05 * place for place in range(8)],
}
#: Name of a variant to model type and configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases, tied": (
        "llama",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, wide heads": ("llama", LLAMA | {"head_dim": 32}),
    "llama, linear": ("llama", LLAMA | {"rope_parameters": LINEAR}),
    "llama, yarn": ("llama", LLAMA | {"rope_parameters": YARN}),
    "llama, llama3": ("llama", LLAMA | {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", LLAMA | {"head_dim": 24, "sliding_window": None}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 32}),
    "qwen3, yarn, own attention factor": (
        "qwen3",
        LLAMA | {"head_dim": 32, "rope_parameters": YARN | {"attention_factor": 1.3}},
    ),
    "mixtral": ("mixtral", LLAMA | EXPERTS | {"num_local_experts": 11, "sliding_window": None}),
    "qwen3_moe": (
        "qwen3_moe",
        LLAMA
        | EXPERTS
        | {"num_experts": 5, "moe_intermediate_size": 48, "norm_topk_prob": True, "head_dim": 32},
    ),
    "olmoe": ("olmoe", OLMOE),
    "olmoe, tied": ("olmoe", OLMOE | {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3, other windows, capped": (
        "gemma3_text",
        GEMMA
        | {
            "layer_types": ["full_attention", "sliding_attention", *["full_attention"] * 5],
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3, linear": (
        "gemma3_text",
        GEMMA
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 9e3},
                "full_attention": LINEAR,
            }
        },
    ),
    "phi3": ("phi3", LLAMA | {"pad_token_id": 0}),
    "phi3, half of each head": (
        "phi3",
        LLAMA
        | {"pad_token_id": 0}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3, long factors": (
        "phi3",
        LLAMA | {"pad_token_id": 0, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    ),
    "phi3, short factors": (
        "phi3",
        LLAMA
        | {"pad_token_id": 0, "max_position_embeddings": 1024, "original_max_position_embeddings": 512}
        | {"rope_parameters": LONGROPE},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied, narrow": ("gpt2", GPT2 | {"n_inner": 96, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox, one after the other, tied": (
        "gpt_neox",
        NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True},
    ),
}


def tiny_tokenizer() -> Any:
    """Return a byte-level tokenizer with one merge."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pieces = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def write_model(name: str, file: Path, ids: list[int]) -> np.ndarray:
    """Write the model of a variant as GGUF and return its logits ``(tokens, vocabulary)``."""
    import torch
    from transformers import CONFIG_MAPPING

    from frugallm.conformance.trial import randomized
    from frugallm.formats.gguf_writer import make_layout, read_back, write_gguf
    from frugallm.models import InMemory

    kind, fields = VARIANTS[name]
    make: Any = CONFIG_MAPPING[kind]
    model = randomized(make(bos_token_id=0, eos_token_id=0, **fields), seed=0)
    checkpoint = InMemory(model, tiny_tokenizer())
    layout = make_layout(checkpoint, "F32")
    write_gguf(checkpoint, file, layout)
    read_back(file, layout)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="variants, by a part of their names")
    parser.add_argument("--work", type=Path, help="folder that keeps the files")
    peers.add_option(parser)
    args = parser.parse_args()
    about = facts()
    names = common.pick(list(VARIANTS), args.only)
    python = peers.peer_python("llama_cpp", args.envs)
    ids = np.random.default_rng(0).integers(1, 256, TOKENS).tolist()
    found: dict[str, dict[str, Any]] = {}
    with common.kept_folder(args.work) as work:
        files = {name: Path(work) / f"{place}.gguf" for place, name in enumerate(names)}
        ours = {name: write_model(name, file, ids) for name, file in files.items()}
        request = Path(work) / "request.json"
        request.write_text(json.dumps({"ids": ids, "models": [str(file) for file in files.values()]}))
        peer = HERE / "peer_llama_cpp_logits.py"
        subprocess.run([python, peer, "--request", request], check=True)
        for name, file in files.items():
            gap = np.abs(np.load(file.with_suffix(".npy")).astype(np.float64) - ours[name])
            largest = float(np.abs(ours[name]).max())
            found[name] = {"largest_difference": float(gap.max()), "largest_logit": largest}
            found[name]["mean_difference"] = float(gap.mean())
    worst = max(names, key=lambda name: found[name]["largest_difference"] / found[name]["largest_logit"])
    share = found[worst]["largest_difference"] / found[worst]["largest_logit"]
    target = f"logits of all families within {MOST_DIFFERENCE:.1%} of the largest one"
    verdict = {"passed": share <= MOST_DIFFERENCE, "worst": worst, "value": share}
    content = {
        "benchmark": "gguf_families",
        "facts": about,
        "setting": {"tokens": TOKENS, "type": "F32"},
        "peer": peers.versions("llama_cpp", python),
        "variants": {name: {"configuration": VARIANTS[name][1], **found[name]} for name in names},
        "verdicts": {target: verdict},
    }
    path = write_result("gguf_families", content)
    rows = [
        [n, f"{f['largest_difference']:.1e}", f"{f['mean_difference']:.1e}", f"{f['largest_logit']:.1f}"]
        for n, f in found.items()
    ]
    print(f"\n{table(['model', 'largest difference', 'mean', 'largest logit'], rows)}\n")
    print(f"- {'PASS' if verdict['passed'] else 'FAIL'}: {target} ({verdict})\n\nWritten to {path}.")


if __name__ == "__main__":
    main()
