"""FrugalLM: the cheapest model that keeps its quality, with the proof.

>>> import frugallm
>>> from frugallm import GPTQ, Embedding
>>> frugallm.run("smollm2-135m", [GPTQ(bits=4), Embedding(bits=8)], out="runs/small")  # doctest: +SKIP
>>> model, tokenizer = frugallm.load("runs/small")  # doctest: +SKIP

Names are imported when they are first used, for torch and transformers take seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frugallm.compression import run
    from frugallm.engine.llm import LLM
    from frugallm.engine.sampling import SamplingParams
    from frugallm.models import load
    from frugallm.progress import Progress
    from frugallm.recipe import Recipe
    from frugallm.training.run import train

__version__ = "0.1.0"

_HOME = {
    "LLM": "frugallm.engine.llm",
    "SamplingParams": "frugallm.engine.sampling",
    "run": "frugallm.compression",
    "load": "frugallm.models",
    "Progress": "frugallm.progress",
    "Recipe": "frugallm.recipe",
    "train": "frugallm.training.run",
}

__all__ = ["LLM", "Progress", "Recipe", "SamplingParams", "__version__", "load", "run", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name[:1].isupper():
        from frugallm.catalogue import methods

        for method in methods().values():
            if method.__name__ == name:
                return method
    raise AttributeError(f"module 'frugallm' has no attribute '{name}'")
