"""The tiny model as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_job import write_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama model of two blocks with grouped heads, a tied head and a tokenizer."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=2)
