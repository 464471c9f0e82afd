"""Small random models of several families as folders, and what the gguf package finds in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_llama import GGUFWriter, tiny_model
from transformers import CONFIG_MAPPING

from frugallm.conformance import trial
from frugallm.models import GGUFFile
from frugallm.progress import Progress


class Heard(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def event(self, kind: str, **facts: Any) -> None:
        if "text" in facts:
            self.said.append(facts["text"])


def written(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return what the package reads: tensors by stored name as values, and their types."""
    tensors = gguf.GGUFReader(path).tensors
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors}
    shapes = {t.name: tuple(map(int, t.shape))[::-1] for t in tensors}
    return {n: v.reshape(shapes[n]) for n, v in values.items()}, {t.name: t.tensor_type.name for t in tensors}


def facts_of(path: Path) -> dict[str, Any]:
    """Return the metadata that the package reads."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def save(folder: Path, model: Any, source: Path) -> Path:
    """Save a model with the tokenizer of the GGUF file ``source`` as a Hugging Face folder."""
    model.save_pretrained(folder)
    for name, content in GGUFFile(source).companions().items():
        if name != "generation_config.json":
            (folder / name).write_bytes(content)
    return folder


def other_family(folder: Path, kind: str, **changes: Any) -> tuple[Path, Any]:
    """Save a small random model of another family with a tokenizer of its kind."""
    fields = {k: getattr(tiny_model().config, k) for k in ("vocab_size", "hidden_size", "intermediate_size")}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = trial.randomized(CONFIG_MAPPING[kind](**(fields | changes)), seed=0)
    pre = "qwen2" if kind.startswith("qwen") else "tekken"
    return save(folder / kind, model, GGUFWriter(folder)(values={"tokenizer.ggml.pre": pre})), model
