"""A GGUF file as a plain ``transformers`` checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor
from transformers import PretrainedConfig

from frugallm.errors import ModelError
from frugallm.models import gguf_positions
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.family import family_of
from frugallm.models.gguf_architectures import (
    EXPERTS,
    IN_BLOCK,
    TOP,
    Architecture,
    architecture_of,
)
from frugallm.models.gguf_reader import GGUFData
from frugallm.models.gguf_tokenizer import build_tokenizer, token_id, tokenizer_files

BLOCK = re.compile(r"blk\.(\d{1,6})\.([a-z_]+)\.(weight|bias)")
DIVISORS = "rope_freqs.weight"


class GGUFFile(Checkpoint):
    """A GGUF file, mapped into memory; each tensor is dequantized when it is read.

    Parameters
    ----------
    license
        Text of the model's license, where one is at hand; it travels along as ``LICENSE``.
    """

    config_source = "its metadata"

    def __init__(self, path: str | Path, name: str | None = None, license: bytes | None = None) -> None:
        self.path = Path(path)
        self.name = name or str(path)
        self._license = license
        self._data = GGUFData(self.path)
        self._architecture = architecture_of(self._data)
        self._stored = _transformers_names(self._data, self._architecture)
        self.config = _config(self._data, self._architecture)
        self.family = family_of(self.config)
        for kind in {self._data.tensors[stored].kind for stored, _ in self._stored.values()}:
            _check_type(kind, self.path)

    def names(self) -> list[str]:  # noqa: D102
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        if name not in self._stored:
            raise ModelError(f"{self.name}: there is no tensor '{name}'")
        stored, expert = self._stored[name]
        shape = self._data.tensors[stored].shape
        return shape if expert is None else shape[1:]

    def where(self, name: str) -> str:  # noqa: D102
        return str(self.path)

    def digest(self) -> str:  # noqa: D102
        return self._digest

    @cached_property
    def _digest(self) -> str:
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def companions(self) -> dict[str, bytes]:  # noqa: D102
        files = tokenizer_files(self.tokenizer)
        files["generation_config.json"] = (json.dumps(self.generation(), indent=2) + "\n").encode()
        if self._license is not None:
            files["LICENSE"] = self._license
        return files

    def generation(self) -> dict[str, Any]:
        """Return the ids of the tokens that begin, end and pad a text."""
        ids = {f"{role}_token_id": getattr(self.config, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        return {key: number for key, number in ids.items() if number is not None}

    @property
    def metadata(self) -> dict[str, str]:
        """License id and name of the model as the file gives them."""
        facts = {"name": "general.name", "license": "general.license"}
        return {
            key: str(self._data.metadata[source])
            for key, source in facts.items()
            if source in self._data.metadata
        }

    @property
    def facts(self) -> dict[str, Any]:
        """All metadata of the file: key to value."""
        return self._data.metadata

    def stored(self, name: str) -> tuple[str, np.ndarray]:
        """Return the type of a tensor and its bytes ``(rows, bytes)``, rows in the order of ``transformers``."""
        self.shape(name)
        raw = self._raw(name)
        order = self._row_order(name, len(raw))
        return self._data.tensors[self._stored[name][0]].kind.name, raw if order is None else raw[order]

    def _raw(self, name: str) -> np.ndarray:
        """Return the bytes ``(rows, bytes)`` of a tensor, or of one expert's part of it, in the order of the file."""
        stored, expert = self._stored[name]
        raw = self._data.raw(stored)
        if expert is None:
            return raw
        count = self._data.tensors[stored].shape[1]
        return raw[expert * count : (expert + 1) * count]

    def _read(self, name: str, start: int | None, stop: int | None) -> Tensor:
        stored, shape, raw = self._stored[name][0], self.shape(name), self._raw(name)
        if len(shape) == 1:  # a vector is one row of bytes: its "rows" are elements
            values = self._dequantize(raw, stored).reshape(shape)
            if name.endswith("norm.weight"):
                values -= self._architecture.gain
            order = self._row_order(name, shape[0])
            return (values if order is None else values[order])[start:stop].clone()
        order = self._row_order(name, len(raw))
        raw = raw[start:stop] if order is None else raw[order[start:stop]]
        return self._dequantize(raw, stored).reshape(-1, *shape[1:])

    def _dequantize(self, raw: np.ndarray, stored: str) -> Tensor:
        with np.errstate(all="ignore"):  # what overflows is found by the check for NaN and infinite values
            values = dequantize(raw, self._data.tensors[stored].kind)
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=not values.flags.owndata))

    def _row_order(self, name: str, rows: int) -> np.ndarray | None:
        """Say which stored row is which row of ``transformers``.

        GGUF keeps the two halves of each rotary pair in q and k of llama side by side (rows ``2i, 2i+1`` of a head),
        ``transformers`` half a head apart (rows ``i, i + d/2``).
        """
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(name.split(".")[-2])
        if heads is None or not self._architecture.paired:
            return None
        if rows % (2 * heads):
            raise ModelError(f"{self.path}: {name} has {rows} rows, which {heads} heads cannot share")
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    def _load_tokenizer(self) -> Any:
        return build_tokenizer(self._data.metadata, self.path)


def _check_type(kind: Any, path: Path) -> None:
    from gguf.constants import GGML_QUANT_SIZES

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise ModelError(
            f"{path} holds tensors of type {kind.name}, which the gguf package cannot read"
        ) from error


def _transformers_names(data: GGUFData, architecture: Architecture) -> dict[str, tuple[str, int | None]]:
    """Map the state-dict name of each tensor to its name in the file and the expert whose part of it that is."""
    found: dict[str, tuple[str, int | None]] = {}
    parts = {**IN_BLOCK, **architecture.names}
    for stored, info in data.tensors.items():
        stem, _, kind = stored.rpartition(".")
        match = BLOCK.fullmatch(stored)
        if stem in TOP:
            found[f"{TOP[stem]}.{kind}"] = stored, None
        elif match and match[2] in parts:
            found[f"model.layers.{int(match[1])}.{parts[match[2]]}.{match[3]}"] = stored, None
        elif match and match[2] in EXPERTS and match[3] == "weight" and len(info.shape) == 3:
            experts = f"model.layers.{int(match[1])}.mlp.experts"
            for number in range(info.shape[0]):
                found[f"{experts}.{number}.{EXPERTS[match[2]]}.weight"] = stored, number
        elif stored != DIVISORS:
            raise ModelError(f"{data.path}: tensor '{stored}' has no place in a model of its architecture")
    return found


def _config(data: GGUFData, architecture: Architecture) -> PretrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    metadata, path, kind = data.metadata, data.path, architecture.model_type
    if metadata.get("split.count", 1) not in (0, 1):
        raise ModelError(
            f"{path} is one part of a split model", "Merge the parts with llama.cpp's gguf-split"
        )
    heads, width = data.count("attention.head_count"), data.count("embedding_length")
    head_dim = data.count("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if data.count(key, head_dim) != head_dim:
            raise ModelError(
                f"{path}: {key} is {data.count(key)}, heads are {head_dim} wide", "Use another model"
            )
    if "token_embd.weight" not in data.tensors:
        raise ModelError(f"{path}: token_embd.weight is missing", "Fetch it again")
    vocabulary, tokens = data.tensors["token_embd.weight"].shape[0], metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > vocabulary:
        raise ModelError(
            f"{path} has {len(tokens)} tokens and an embedding of {vocabulary}", "Fetch it again"
        )
    try:
        make: Any = CONFIG_MAPPING[kind]
        return make(
            architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]],
            hidden_size=width,
            intermediate_size=data.count("feed_forward_length"),
            num_hidden_layers=data.count("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=data.count("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=data.count("context_length"),
            vocab_size=vocabulary,
            rms_norm_eps=data.real("attention.layer_norm_rms_epsilon", 1e-5),
            rope_parameters=_all_positions(data, head_dim, architecture.local_base),
            **{name: f"blk.0.{part}.bias" in data.tensors for name, part in architecture.biases.items()},
            **{name: data.count(key) for name, key in architecture.counts.items()},
            **architecture.fixed,
            **architecture.more(data),
            tie_word_embeddings="output.weight" not in data.tensors,
            bos_token_id=token_id(metadata, "bos", path),
            eos_token_id=token_id(metadata, "eos", path),
            pad_token_id=token_id(metadata, "padding", path),
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{path}: its metadata describes no {kind} model ({error})") from error


def _all_positions(data: GGUFData, head_dim: int, local_base: float) -> dict[str, Any]:
    """Return the rotary positions, by kind of attention where there are two."""
    found = _positions(data, head_dim)
    if not local_base:
        return found
    local = gguf_positions.plain(data.real("rope.freq_base_swa", local_base))
    return {"full_attention": found, "sliding_attention": local}


def _positions(data: GGUFData, head_dim: int) -> dict[str, Any]:
    theta, kind = data.real("rope.freq_base", 10000.0), data.value("rope.scaling.type", "none")[1]
    context = data.count("context_length")
    if DIVISORS in data.tensors and kind == "none":
        info = data.tensors[DIVISORS]
        if info.shape != (head_dim // 2,) or info.kind.name != "F32":
            raise ModelError(f"{data.path}: {DIVISORS} has shape {info.shape}, heads are {head_dim} wide")
        divisors = torch.from_numpy(data.raw(DIVISORS).view(np.float32).reshape(-1).copy())
        if not (torch.isfinite(divisors).all() and (divisors > 0).all()):
            raise ModelError(
                f"{data.path}: {DIVISORS} holds values that divide no frequency", "Fetch it again"
            )
        return gguf_positions.divided(theta, divisors, context)
    if kind == "none":
        return gguf_positions.plain(theta)
    if kind not in ("linear", "yarn") or DIVISORS in data.tensors:
        raise ModelError(f"{data.path} scales its rotary frequencies ({kind}), which is not read from GGUF")
    factor = data.real("rope.scaling.factor", 1.0)
    if kind == "linear":
        return gguf_positions.linear(theta, factor)
    original = data.count("rope.scaling.original_context_length", context)
    return gguf_positions.yarn(theta, factor, original, data.real("rope.scaling.attn_factor", 1.0))
