"""A tiny llama model with a byte-level tokenizer, and its GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from frugallm.formats.gguf_types import encode

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "1 2"]
TOKENS = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["th", "the", "Ġthe", "12", "<extra>"]
TYPES = [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL) - 1) + [4]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def tiny_config(**changes: Any) -> LlamaConfig:
    settings = {
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**(settings | changes))


def tiny_model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():  # gains away from one, biases away from zero
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False).eval()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


@dataclass
class GGUFWriter:
    """Writes a tiny model as llama.cpp's converter would, with single facts changed on demand."""

    folder: Path

    def __call__(
        self,
        name: str = "tiny.gguf",
        model: LlamaForCausalLM | None = None,
        kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        edit: Callable[[dict[str, np.ndarray]], None] | None = None,
        values: dict[str, Any] | None = None,
        kinds: dict[str, str] | None = None,
    ) -> Path:
        """Write a file; ``kinds`` says by the ends of names which tensors have another type than ``kind``."""
        model = model or tiny_model()
        config, path = model.config, self.folder / name
        writer = gguf.GGUFWriter(path, "llama")
        self._metadata(writer, config, values or {})
        tensors = self._tensors(model, config)
        if edit is not None:
            edit(tensors)
        for stored, array in tensors.items():
            own = next((k for end, k in (kinds or {}).items() if stored.endswith(end)), None)
            if own is not None:
                blocks = encode(torch.from_numpy(np.ascontiguousarray(array)), own)
                writer.add_tensor(stored, blocks, raw_dtype=gguf.GGMLQuantizationType[own])
            elif array.ndim == 2 and kind is not gguf.GGMLQuantizationType.F32:
                writer.add_tensor(stored, gguf.quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(stored, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _metadata(self, writer: gguf.GGUFWriter, config: LlamaConfig, values: dict[str, Any]) -> None:
        facts: dict[str, Any] = {
            "general.name": "Tiny",
            "general.license": "apache-2.0",
            "llama.block_count": config.num_hidden_layers,
            "llama.context_length": config.max_position_embeddings,
            "llama.embedding_length": config.hidden_size,
            "llama.feed_forward_length": config.intermediate_size,
            "llama.attention.head_count": config.num_attention_heads,
            "llama.attention.head_count_kv": config.num_key_value_heads,
            "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "llama.rope.freq_base": config.rope_parameters["rope_theta"],
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.token_type": TYPES,
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": TEMPLATE,
        }
        for key, value in (facts | values).items():
            if value is None:
                continue
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)

    def _tensors(self, model: LlamaForCausalLM, config: LlamaConfig) -> dict[str, np.ndarray]:
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        tensors = {}
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            array = tensor.float().numpy()
            if ".q_proj." in name:
                array = permute(array, config.num_attention_heads)
            if ".k_proj." in name:
                array = permute(array, config.num_key_value_heads)
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert stored is not None
            tensors[stored] = array
        return tensors
