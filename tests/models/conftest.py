"""The tiny model as a GGUF file and as a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_llama import GGUFWriter

from frugallm.models import GGUFFile, dense_model


@pytest.fixture
def write_gguf(tmp_path: Path) -> GGUFWriter:
    return GGUFWriter(tmp_path)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GGUFWriter(tmp_path_factory.mktemp("gguf"))()


@pytest.fixture(scope="session")
def tiny_folder(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("folder")
    checkpoint = GGUFFile(tiny_gguf)
    dense_model(checkpoint).save_pretrained(folder)
    for name, content in checkpoint.companions().items():
        (folder / name).write_bytes(content)
    (folder / "LICENSE").write_text("do what you like\n")
    return folder


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny folder to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))
