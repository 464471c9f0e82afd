"""A tiny model that answers, as a folder."""

import pytest

from small_engine import letters_tokenizer
from tiny_decoders import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    letters_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Answers are compared with those of the plain model, whose arithmetic native kernels do not share."""
    monkeypatch.setenv("FRUGAL_KERNELS", "reference")
