"""Models: where they are, how weights are read tensor by tensor, how a plain model is filled from them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frugallm.models.checkpoint import Checkpoint
    from frugallm.models.family import Family, family_of
    from frugallm.models.gguf_file import GGUFFile
    from frugallm.models.in_memory import InMemory
    from frugallm.models.offgrid import Offgrid
    from frugallm.models.open import dense_model, load, open_checkpoint
    from frugallm.models.safetensors_folder import SafetensorsFolder

_HOME = {
    "Checkpoint": "checkpoint",
    "Family": "family",
    "GGUFFile": "gguf_file",
    "InMemory": "in_memory",
    "Offgrid": "offgrid",
    "SafetensorsFolder": "safetensors_folder",
    "dense_model": "open",
    "family_of": "family",
    "load": "open",
    "open_checkpoint": "open",
}

__all__ = [
    "Checkpoint",
    "Family",
    "GGUFFile",
    "InMemory",
    "Offgrid",
    "SafetensorsFolder",
    "dense_model",
    "family_of",
    "load",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: a name brings its module when it is first used.
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
