"""A small random model of every family, in the variants that its description has to bear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frugallm.conformance.trial import BLOCKS, randomized

#: Odd widths, grouped heads where the family has them; what is left out has the family's default.
_LLAMA: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}
#: Name of a variant to model type and configuration. Windows of 48 tokens are longer than the sliding ones.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 16, "head_dim": 24}),
    "qwen2, tied": ("qwen2", _LLAMA | {"tie_word_embeddings": True}),
    "qwen2, sliding": (
        "qwen2",
        _LLAMA | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 32, "attention_bias": True}),
    "gemma3": (
        "gemma3_text",
        _LLAMA
        | {
            "head_dim": 32,
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", _LLAMA | {"pad_token_id": 0, "sliding_window": 16}),
    "gpt2": (
        "gpt2",
        {"vocab_size": 67, "n_embd": 96, "n_layer": BLOCKS, "n_head": 6, "n_positions": 128, "n_inner": 160},
    ),
    "opt": (
        "opt",
        {
            "vocab_size": 67,
            "hidden_size": 96,
            "word_embed_proj_dim": 96,
            "ffn_dim": 160,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 6,
            "max_position_embeddings": 128,
        },
    ),
    "opt, gelu, untied": (
        "opt",
        {
            "vocab_size": 67,
            "hidden_size": 96,
            "word_embed_proj_dim": 96,
            "ffn_dim": 160,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 6,
            "max_position_embeddings": 128,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "vocab_size": 67,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 6,
            "max_position_embeddings": 128,
        },
    ),
    "gpt_neox, one after the other": (
        "gpt_neox",
        {
            "vocab_size": 67,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 6,
            "max_position_embeddings": 128,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("mixtral", _LLAMA | _EXPERTS | {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", _LLAMA | _EXPERTS | {"num_experts": 5, "moe_intermediate_size": 48}),
    "qwen3_moe, first block dense": (
        "qwen3_moe",
        _LLAMA | _EXPERTS | {"num_experts": 5, "moe_intermediate_size": 48, "mlp_only_layers": [0]},
    ),
    "olmoe": ("olmoe", _LLAMA | _EXPERTS | {"num_experts": 4}),
    "olmoe, clipped": ("olmoe", _LLAMA | _EXPERTS | {"num_experts": 4, "clip_qkv": 0.5}),
}


def variant(name: str) -> Any:
    """Return the small random model of that name, float32."""
    from transformers import CONFIG_MAPPING

    kind, fields = VARIANTS[name]
    make: Any = CONFIG_MAPPING[kind]
    config = make(bos_token_id=1, eos_token_id=2, **fields)
    return randomized(config, seed=list(VARIANTS).index(name))


def tokens() -> Tensor:
    """Return calibration windows ``(6, 48)`` of random tokens."""
    return torch.randint(67, (6, 48), generator=torch.Generator().manual_seed(7))
