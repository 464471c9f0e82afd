"""Synthetic Llama checkpoints of any size, written shard by shard, with one block in memory at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
VOCABULARY = 49_152  # that of the default model, whose tokenizer goes with the weights


@dataclass(frozen=True)
class Shape:
    """Widths and depth of a Llama model with heads of ``head_dim``."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False

    def block(self) -> dict[str, tuple[int, ...]]:
        """Return names within a block and shapes of its tensors."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (wide, self.hidden),
            "self_attn.k_proj.weight": (narrow, self.hidden),
            "self_attn.v_proj.weight": (narrow, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, wide),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.ffn, self.hidden),
            "mlp.up_proj.weight": (self.ffn, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.ffn),
        }

    @property
    def block_parameters(self) -> int:
        """Number of parameters of one block."""
        return sum(torch.Size(shape).numel() for shape in self.block().values())

    def config(self) -> dict[str, object]:
        """Return the content of ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> int:
    """Write seeded random bf16 weights, a shard per block, with the default tokenizer; return bytes."""
    from frugallm.models.open import open_checkpoint

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    place: dict[str, str] = {}
    total = 0

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        tensors = {key: _values(key, size, generator) for key, size in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        place.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * t.element_size() for t in tensors.values())

    tables = [EMBEDDING] if shape.tied else [EMBEDDING, HEAD]
    for number, table in enumerate(tables):
        shard(f"table-{number}.safetensors", {table: (VOCABULARY, shape.hidden)})
    shard("norm.safetensors", {FINAL_NORM: (shape.hidden,)})
    for layer in range(shape.layers):
        names = {f"model.layers.{layer}.{key}": size for key, size in shape.block().items()}
        shard(f"block-{layer:03}.safetensors", names)
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    for name, content in open_checkpoint("smollm2-135m").companions().items():
        (folder / name).write_bytes(content)
    return total


def _values(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return ones for a norm, otherwise uniform values with the variance that keeps activations in range."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    bound = 0.05 if name in (EMBEDDING, HEAD) else (3 / size[1]) ** 0.5
    return torch.empty(size, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)
