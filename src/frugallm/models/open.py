"""From what a user writes to a checkpoint, or to a plain ``transformers`` model."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from frugallm.errors import ModelError
from frugallm.models.checkpoint import Checkpoint, meta_model
from frugallm.models.default_model import locate
from frugallm.models.gguf_file import GGUFFile
from frugallm.models.in_memory import InMemory
from frugallm.models.linears import to_plain
from frugallm.models.offgrid import Offgrid
from frugallm.models.safetensors_folder import (
    SafetensorsFolder,
    load_tokenizer,
    open_safetensors,
    parse_config,
    read_config,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Source = str | Path | PreTrainedModel | Checkpoint

OFFGRID = "-offgrid"


def open_checkpoint(model: Source, tokenizer: Any = None, *, compressed: bool = False) -> Checkpoint:
    """Open the weights of a model and check that they fit their configuration.

    Parameters
    ----------
    model
        A folder, a GGUF file, a name (``"smollm2-135m"`` or one on the Hugging Face hub), any of these with
        ``-offgrid`` behind it, a loaded model, or a checkpoint.
    tokenizer
        Tokenizer of a loaded model.
    compressed
        Also open a folder that is compressed already; its weights have the values that their codes stand for.

    Raises
    ------
    ModelError
        If the model cannot be found, read or understood, or is compressed already and that is not asked for.
    """
    from transformers import PreTrainedModel

    from frugallm.formats.packed_folder import reader_of

    if isinstance(model, Checkpoint):
        return model
    if isinstance(model, PreTrainedModel):
        checkpoint: Checkpoint = InMemory(model, tokenizer)
    elif not isinstance(model, (str, Path)):
        raise ModelError(f"a model must be a name, a path or a loaded model, got {type(model).__name__}")
    elif _offgrid(model):
        return Offgrid(open_checkpoint(str(model).removesuffix(OFFGRID)))
    else:
        found = locate(model)
        name = str(model)
        if found.path.is_dir():
            reader = (reader_of(found.path) if compressed else None) or SafetensorsFolder
            checkpoint = reader(found.path, name)
        else:
            checkpoint = GGUFFile(check_gguf(found.path), name, found.license)
    checkpoint.validate()
    return checkpoint


def check_gguf(path: Path) -> Path:
    """Check that a file is GGUF by name and content, and say what it is otherwise."""
    try:
        with path.open("rb") as stream:
            magic = stream.read(4) == b"GGUF"
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error
    if magic and path.suffix != ".gguf":
        raise ModelError(f"{path} is a GGUF file by its content", "Rename it to .gguf")
    if not magic and path.suffix == ".gguf":
        raise ModelError(f"{path} is not a GGUF file by its content", "Fetch it again, or give its true name")
    if not magic and path.suffix == ".safetensors":
        raise ModelError(f"{path} is a file of weights alone", "Give the folder that also holds config.json")
    if not magic:
        raise ModelError(
            f"{path} is no model file", "Give a .gguf file or a Hugging Face folder with safetensors"
        )
    return path


def load(model: Source, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """Load anything as a plain ``transformers`` model on the CPU, with its tokenizer.

    A folder in the compressed-tensors format, or one of a family that has no description, is left to ``transformers``
    alone; what it cannot read of a result of ``frugal run``, and the layouts of toolkits that need their own kernels
    (:mod:`frugallm.formats.packed_folder`), are read here.
    """
    from frugallm.formats.packed_folder import load_packed, reader_of

    if isinstance(model, (str, Path)) and not _offgrid(model):
        found = locate(model)
        if found.path.is_dir() and _for_transformers(found.path):
            reader = reader_of(found.path)
            if reader is not None and reader.only_read_here(found.path):
                return load_packed(reader(found.path), dtype), load_tokenizer(found.path)
            return load_plain(found.path, dtype), load_tokenizer(found.path)
    checkpoint = open_checkpoint(model)
    return dense_model(checkpoint, dtype), checkpoint.tokenizer


def dense_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Fill a plain ``transformers`` model from a checkpoint: for use, without gradients."""
    model = meta_model(checkpoint, dtype)
    state = to_plain(checkpoint.family, checkpoint.names(), lambda name: checkpoint.tensor(name).to(dtype))
    model.load_state_dict(
        state, strict=False, assign=True
    )  # names were checked against the same configuration
    model.tie_weights()
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise ModelError(
            f"{checkpoint.name}: nothing fills {empty[0]}", "Open it with open_checkpoint, which checks"
        )
    model.generation_config = _generation_config(checkpoint, model)
    return model.requires_grad_(False).eval()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep progress bars of libraries, which cannot all be turned off, from standard error."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def load_plain(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a folder with ``transformers`` alone: local files, safetensors, no remote code."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from frugallm.formats.outside import decode_in

    for file in weight_files(folder):
        open_safetensors(folder / file)
    try:
        with _without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
            # compressed-tensors would wait for a call of the whole model; its decoder may be called alone.
            decode_in(model, dtype)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise ModelError(f"{folder} cannot be loaded by transformers ({error})") from error
    return model.requires_grad_(False).eval()


def _offgrid(model: str | Path) -> bool:
    return str(model).endswith(OFFGRID) and not os.path.exists(model)


def _for_transformers(folder: Path) -> bool:
    from frugallm.models.family import FAMILIES

    raw = read_config(folder)
    parse_config(raw, folder / "config.json")
    known = {kind for family in FAMILIES for kind in family.model_types}
    return "quantization_config" in raw or raw["model_type"] not in known


def _generation_config(checkpoint: Checkpoint, model: PreTrainedModel) -> Any:
    from transformers import GenerationConfig

    stored = checkpoint.generation()
    if stored is None:
        return model.generation_config
    try:
        return GenerationConfig.from_dict(stored)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{checkpoint.name}: generation_config.json cannot be read ({error})") from error
