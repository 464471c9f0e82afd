"""A Hugging Face model folder: written completely elsewhere, then given its name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugallm.formats import shards
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.linears import to_files

#: Called with a tensor's full name and value; returns what is stored in its place.
Encode = Callable[[str, Tensor], Mapping[str, Tensor]]


def config_json(checkpoint: Checkpoint, dtype: str, quantization: Mapping[str, Any] | None) -> bytes:
    """Return ``config.json`` of the model with ``dtype`` as the type of what is not quantized."""
    config = copy.deepcopy(checkpoint.config)
    config.dtype = dtype
    content = config.to_dict()
    for private in ("_name_or_path", "_attn_implementation"):
        content.pop(private, None)
    if quantization is not None:
        content["quantization_config"] = quantization
    return (json.dumps(content, indent=2, sort_keys=True, default=str) + "\n").encode()


def write_companions(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Write tokenizer, chat template, generation config and licence; return their names."""
    files = checkpoint.companions()
    for name, content in sorted(files.items()):
        shards.write_bytes(folder / name, content)
    return sorted(files)


def part_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of a model's parts in order: ``embedding``, ``block-00000`` …, ``final``."""
    blocks = [f"block-{i:05d}" for i in range(checkpoint.config.num_hidden_layers)]
    return ["embedding", *blocks, "final"]


def write_dense(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
    """Write an uncompressed copy of a model, part by part, in ``dtype``."""
    write_model(checkpoint, folder, dtype, lambda name, value: {name: value.to(dtype)}, None)


def write_model(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: torch.dtype,
    encode: Encode,
    quantization: Mapping[str, Any] | None,
    stem: str = "model",
) -> None:
    """Write a model, part by part, with what ``encode`` makes of each tensor.

    ``dtype`` is the type of what is not quantized, ``quantization`` the ``quantization_config`` of ``config.json``,
    ``stem`` the beginning of the names of the files of weights.
    """
    folder.mkdir(parents=True)
    family = checkpoint.family
    embedding = f"{family.embedding}.weight"
    shards.write_shard(folder / "embedding.part", dict(encode(embedding, checkpoint.tensor(embedding))))
    for i in range(checkpoint.config.num_hidden_layers):
        state: dict[str, Tensor] = {}
        for name, value in checkpoint.block_state(i).items():
            state.update(encode(f"{family.block(i)}.{name}", value))
        shards.write_shard(folder / f"block-{i:05d}.part", to_files(family, state))
    rest: dict[str, Tensor] = {}
    for name in final_names(checkpoint):
        rest.update(encode(name, checkpoint.tensor(name)))
    shards.write_shard(folder / "final.part", to_files(family, rest))
    parts = [folder / f"{name}.part" for name in part_names(checkpoint)]
    shards.merge(parts, folder, stem=stem)
    for part in parts:
        part.unlink()
    shards.write_bytes(
        folder / "config.json", config_json(checkpoint, str(dtype).removeprefix("torch."), quantization)
    )
    write_companions(checkpoint, folder)


def final_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of tensors that are neither in a block nor the embedding: final norm, untied head."""
    family = checkpoint.family
    return [
        n
        for n in checkpoint.names()
        if not n.startswith(f"{family.blocks}.") and n != f"{family.embedding}.weight"
    ]
