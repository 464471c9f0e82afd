"""Tiny models of every family that the engine computes, with random weights."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
SPECIAL = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 9, "head_dim": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 6},
    "gemma3_text": {
        "head_dim": 6,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 6,
    },
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 6},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def tiny(kind: str, **changes):
    """Return a model of one family with weights large enough that its answers vary."""
    config = CONFIG_MAPPING[kind](**(COMMON | SPECIAL.get(kind, {}) | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data.copy_(noise * 0.3 if parameter.ndim > 1 else parameter + noise * 0.1)
    return model.requires_grad_(False).eval()
