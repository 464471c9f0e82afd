"""The tiny model as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_job import write_model
from small_training import small_bitnet


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama model of two blocks with grouped heads, a tied head and a tokenizer."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=2)


@pytest.fixture(scope="session")
def bitnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model trained for a few steps with ternary weights."""
    return small_bitnet(tmp_path_factory.mktemp("bitnet") / "out", "ternary")
