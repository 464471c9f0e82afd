"""A Hugging Face folder: ``config.json`` and one or more safetensors files, mapped and read lazily."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from frugallm.errors import ModelError
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.family import Family, family_of
from frugallm.models.linears import name_here, turned

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Files of our own container, which no other program should take for a plain model.
OWN_SINGLE, OWN_INDEX = "frugallm.safetensors", "frugallm.safetensors.index.json"
FLOATS = ("F16", "BF16", "F32", "F64")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# Frequencies and causal masks that old files carry.
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(bias|masked_bias)$")
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)


class SafetensorsFolder(Checkpoint):
    """A folder as ``save_pretrained`` writes it.

    A folder that is compressed already opens too, so that its facts can be shown; its weights stay shut.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        self.path = Path(folder)
        self.name = name or str(folder)
        raw = read_config(self.path)
        self.compressed = "quantization_config" in raw
        self.quantization = raw.pop("quantization_config", None)
        self.config = parse_config(raw, self.path / "config.json")
        try:
            self.family = family_of(self.config)
        except ModelError as error:
            raise ModelError(f"{self.path}: {error.message}", error.hint) from error
        self._files = {file: open_safetensors(self.path / file) for file in weight_files(self.path)}
        holder = {name: file for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118
        check_index(self.path, holder)
        self._stored_as = names_in_files(self.family, holder)
        self._holder = {name: holder[stored] for name, stored in self._stored_as.items()}
        self._shapes = {name: self._oriented(name, self._slice(name).get_shape()) for name in self._holder}

    @property
    def _head(self) -> str:
        return f"{self.family.head}.weight"

    def names(self) -> list[str]:  # noqa: D102
        tied = self.config.tie_word_embeddings
        return [name for name in sorted(self._shapes) if not (tied and name == self._head)]

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        if name not in self._shapes:
            raise ModelError(f"{self.name}: there is no tensor '{name}'")
        return self._shapes[name]

    def where(self, name: str) -> str:  # noqa: D102
        return str(self.path / self._holder.get(name, ""))

    def validate(self) -> None:
        """Check names, shapes, float types, and that a stored head of a tied model is the embedding."""
        self._refuse_compressed()
        super().validate()
        self._check_stored(self.names())

    def _check_stored(self, names: list[str]) -> None:
        for name in names:
            stored = self._slice(name).get_dtype()
            if stored not in FLOATS:
                raise ModelError(
                    f"{self.where(name)}: {name} is stored as {stored}", f"Known: {', '.join(FLOATS)}"
                )
        embedding = f"{self.family.embedding}.weight"
        if self.config.tie_word_embeddings and self._head in self._shapes:
            same = self._shapes[self._head] == self._shapes[embedding] and torch.equal(
                self._slice(self._head)[:], self._slice(embedding)[:]
            )
            if not same:
                raise ModelError(
                    f"{self.where(self._head)}: {self._head} differs from {embedding}, config.json ties them",
                    'Set "tie_word_embeddings": false in config.json',
                )

    def digest(self) -> str:  # noqa: D102
        return self._digest

    @cached_property
    def _digest(self) -> str:
        total = hashlib.sha256()
        for file in sorted(self._files):
            with (self.path / file).open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()

    def companions(self) -> dict[str, bytes]:  # noqa: D102
        found = {path for pattern in COMPANIONS for path in self.path.glob(pattern) if path.is_file()}
        return {path.name: path.read_bytes() for path in sorted(found)}

    @property
    def metadata(self) -> dict[str, str]:
        """License id from the front matter of the folder's README.md, and the folder's name."""
        card = self.path / "README.md"
        text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
        license = re.search(r"\A---\n.*?^license:\s*(\S+)", text, re.MULTILINE | re.DOTALL)
        return {"name": self.path.resolve().name} | ({"license": license[1]} if license else {})

    def _slice(self, name: str) -> Any:
        return self._files[self._holder[name]].get_slice(self._stored_as[name])

    def _oriented(self, name: str, shape: list[int]) -> tuple[int, ...]:
        return tuple(reversed(shape)) if turned(self.family, name, tuple(shape)) else tuple(shape)

    def _read(self, name: str, start: int | None, stop: int | None) -> Tensor:
        self._refuse_compressed()
        return self._stored(name, start, stop)

    def _stored(self, name: str, start: int | None, stop: int | None) -> Tensor:
        try:
            turn = turned(self.family, name, self._shapes[name])
            if start is None:
                stored = self._files[self._holder[name]].get_tensor(self._stored_as[name])
            else:
                stored = self._slice(name)[:, start:stop] if turn else self._slice(name)[start:stop]
            stored = stored.T if turn else stored
        except SafetensorError as error:
            raise ModelError(f"{self.where(name)}: {name} cannot be read ({error})") from error
        # The handle gives out its own mapped memory; a copy keeps later changes out of the next read.
        stored = stored.float() if stored.dtype is torch.float64 else stored
        return stored.clone(memory_format=torch.contiguous_format)

    def _load_tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    def _refuse_compressed(self) -> None:
        if self.compressed:
            raise ModelError(
                f"{self.path} is already compressed (quantization_config in config.json)",
                "Start from the original model",
            )


def names_in_files(family: Family, stored: Iterable[str]) -> dict[str, str]:
    """Return how each tensor is called in files, by its name here.

    Files of some publishers leave the model's own name out (``h.0.attn.c_attn.weight``), use other names for experts, and
    carry buffers that are computed anew.
    """
    known = {name_here(family, name): name for name in stored if not BUFFERS.search(name)}
    base, head = f"{family.base}.", f"{family.head}."
    if any(name.startswith(base) for name in known):
        return known
    return {name if name.startswith(head) else f"{base}{name}": there for name, there in known.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a folder as it lies."""
    path = folder / "config.json"
    if not path.is_file():
        if folder.is_dir() and not any(folder.iterdir()):
            raise ModelError(f"{folder} is empty", "Give a folder with config.json and model.safetensors")
        hint = (
            "Give the .gguf file itself" if any(folder.glob("*.gguf")) else "Give a Hugging Face model folder"
        )
        raise ModelError(f"{folder} has no config.json", hint)
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is one clear error."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def parse_config(raw: dict[str, Any], path: Path) -> PretrainedConfig:
    """Turn the content of ``config.json`` into a configuration; code that comes with a model is never run."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{path} has no model_type", "Give a Hugging Face model folder")
    if kind not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise ModelError(
                f"{path}: '{kind}' needs code that comes with the model", "Remote code is never run"
            )
        raise ModelError(f"{path}: architecture '{kind}' is unknown to transformers")
    try:
        config = CONFIG_MAPPING[kind].from_dict({k: v for k, v in raw.items() if k != "auto_map"})
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ModelError(f"{path} is no valid '{kind}' configuration ({error})") from error
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and context < 1:
        raise ModelError(f"{path} is no valid '{kind}' configuration (a context of {context} positions)")
    return config


def weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's safetensors files: the single one, or those the index lists."""
    for single in (SINGLE, OWN_SINGLE):
        if (folder / single).is_file():
            return [single]
    index = _index(folder)
    if index is not None:
        files = sorted(set(_weight_map(index).values()))
        for file in files:
            if not (folder / file).is_file():
                raise ModelError(f"{index} lists {file}, which is missing", "Fetch the model again")
        return files
    if any(any(folder.glob(pattern)) for pattern in PICKLES):
        raise ModelError(
            f"{folder} holds its weights as pickle files, which can run code and are refused",
            "Convert them to safetensors where you trust them: model.save_pretrained(folder)",
        )
    raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}", "Give a folder with safetensors weights")


def _index(folder: Path) -> Path | None:
    found = [folder / index for index in (INDEX, OWN_INDEX) if (folder / index).is_file()]
    return found[0] if found else None


def _weight_map(index: Path) -> dict[str, str]:
    listed = read_json(index).get("weight_map")
    listed = listed if isinstance(listed, dict) else {}
    names = list(listed.values())
    # An index names files beside itself; anything else could reach out of the folder.
    if not names or not all(
        isinstance(n, str) and n.endswith(".safetensors") and Path(n).name == n for n in names
    ):
        raise ModelError(f"{index} has no usable weight_map", "Fetch the model again")
    return listed


def check_index(folder: Path, holder: dict[str, str]) -> None:
    """Check that tensors lie in the files where the index, if there is one, says they do."""
    index = _index(folder)
    if index is None or {SINGLE, OWN_SINGLE} & set(holder.values()):
        return
    for name, file in _weight_map(index).items():
        if holder.get(name) != file:
            raise ModelError(
                f"{folder / file} lacks {name}, which {index.name} lists there", "Fetch the model again"
            )


def open_safetensors(path: Path) -> Any:
    """Map a safetensors file; a damaged header is one clear error."""
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == b"GGUF":
        raise ModelError(
            f"{path} is a GGUF file by its content", "Rename it to .gguf and give the file itself"
        )
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is no intact safetensors file ({error})", "Fetch it again") from error


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder with plain ``transformers``."""
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / file).is_file() for file in files):
        raise ModelError(f"{folder} has no tokenizer", f"It needs one of {', '.join(files)}")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception; all of it means the same here
        raise ModelError(f"{folder}: the tokenizer cannot be read ({error})") from error
