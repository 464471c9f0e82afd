"""What llama.cpp calls the parts of a model, read: architectures, tensors of a block, hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from frugallm.errors import ModelError
from frugallm.models.gguf_reader import LARGEST, GGUFData

TOP = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
#: The linears of all experts of a block, one tensor each.
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's architecture is in ``transformers``.

    Attributes
    ----------
    model_type
        Its name there.
    biases
        Field of the configuration to the linear whose bias says that it holds.
    counts
        Field of the configuration to the key of the file that holds it.
    fixed
        Fields of the configuration that llama.cpp takes for granted, with their values.
    paired
        Whether the rows of q and k lie rotary pair by rotary pair.
    names
        Parts of a block that are others here than in :data:`IN_BLOCK`.
    gain
        What the file has added to the gains of norms.
    local_base
        Base of the rotary positions of blocks that look back only so far, unless the file says another; 0: there are no
        such blocks.
    more
        Returns further fields of the configuration.
    """

    model_type: str
    biases: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    paired: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    gain: float = 0.0
    local_base: float = 0.0
    more: Callable[[GGUFData], dict[str, Any]] = lambda _: {}


def _gemma(data: GGUFData) -> dict[str, Any]:
    """Return which blocks look back only so far, and what scales scores and logits."""
    blocks, heads = data.count("block_count"), data.count("attention.head_count")
    width = data.count("embedding_length") // heads
    window = data.count("attention.sliding_window", LARGEST - 1)
    key, pattern = data.value("attention.sliding_window_pattern", None)
    if pattern is None:
        pattern = [window < LARGEST - 1 and (block + 1) % GEMMA_PERIOD != 0 for block in range(blocks)]
    if not isinstance(pattern, list) or len(pattern) != blocks:
        raise ModelError(f"{data.path}: {key} is {pattern!r}, expected a value for each of {blocks} blocks")
    scale = width if blocks == GEMMA_27B else data.count("attention.key_length", width)
    found = {
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "sliding_window": window,
        "query_pre_attn_scalar": scale,
    }
    if data.value("final_logit_softcapping", None)[1] is not None:
        found["final_logit_softcapping"] = data.real("final_logit_softcapping", 0.0)
    return found


#: In Gemma 3 every sixth block sees the whole text; its one size with so many blocks scales its queries otherwise.
GEMMA_PERIOD, GEMMA_27B = 6, 62
MIXTURE = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
ARCHITECTURES = {
    "llama": Architecture("llama", {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}, paired=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", {"attention_bias": "attn_q"}),
    "qwen3moe": Architecture(
        "qwen3_moe",
        counts=MIXTURE | {"moe_intermediate_size": "expert_feed_forward_length"},
        fixed={"norm_topk_prob": True},
    ),
    "olmoe": Architecture("olmoe", counts=MIXTURE, fixed={"norm_topk_prob": False}),
    "gemma3": Architecture(
        "gemma3_text",
        names={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        gain=1.0,
        local_base=10000.0,
        more=_gemma,
    ),
}
#: What the file calls llama where it has experts.
MIXTRAL = Architecture(
    "mixtral",
    counts={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    fixed={"sliding_window": None},
    paired=True,
)


def architecture_of(data: GGUFData) -> Architecture:
    """Return the architecture that a file names.

    Raises
    ------
    ModelError
        If there is none of that name.
    """
    name = data.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{data.path}: architecture '{name}' is not read from GGUF",
            f"Supported: {', '.join(ARCHITECTURES)}",
        )
    if name == "llama" and data.metadata.get("llama.expert_count", 0) != 0:
        return MIXTRAL
    return ARCHITECTURES[name]
