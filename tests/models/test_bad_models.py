"""Damaged, renamed and misfit model files: one line that names the file, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_llama import GGUFWriter

from frugallm.errors import FrugalError, ModelError
from frugallm.models import SafetensorsFolder, load, open_checkpoint


def read_everything(model: str | Path) -> None:
    checkpoint = open_checkpoint(model)
    for name in checkpoint.names():
        checkpoint.tensor(name)
    assert checkpoint.tokenizer


def refused(model: str | Path, names: str | Path, said: str = "") -> None:
    with pytest.raises(FrugalError) as caught:
        read_everything(model)
    message = str(caught.value)
    assert caught.value.status == 2
    assert "\n" not in message and str(names) in message and said in message, message


def edit_config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_gguf(tiny_gguf: Path, tmp_path: Path, share: float) -> None:
    content = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, path)


@pytest.mark.parametrize("share", [0.0, 0.00002, 0.001, 0.01, 0.5, 0.9999])
def test_truncated_safetensors(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(folder, path)


def test_renamed_files(folder: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    posing = Path(shutil.copy(weights, tmp_path / "posing.gguf"))
    refused(posing, posing, "not a GGUF file")
    for name in ("posing.safetensors", "posing.bin"):
        other = Path(shutil.copy(tiny_gguf, tmp_path / name))
        refused(other, other, "is a GGUF file")
    shutil.copy(tiny_gguf, weights)
    refused(folder, weights, "is a GGUF file")


def test_lone_and_unknown_files(folder: Path, tmp_path: Path) -> None:
    refused(folder / "model.safetensors", folder / "model.safetensors", "config.json")
    unknown = tmp_path / "model.txt"
    unknown.write_text("hello")
    refused(unknown, unknown, "no model file")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused(folder, folder, "neither model.safetensors")


def test_missing_and_empty(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", tmp_path / "nothing", "no file or folder")
    refused(str(tmp_path / "nothing.gguf"), tmp_path / "nothing.gguf", "no file or folder")
    refused("", "''")
    refused("x" * 500, "x" * 500)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, empty, "empty")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, folder, "pickle")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(folder: Path, write_gguf: GGUFWriter, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    state = load_file(folder / "model.safetensors")
    state[name][5, 7] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, folder / "model.safetensors", name)

    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.1.ffn_up.weight"] = np.where(np.arange(64) == 7, value, tensors["blk.1.ffn_up.weight"])

    path = write_gguf(edit=lambda tensors: (edit(tensors), None)[1])
    refused(path, path, name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intermediate_size": 112}, "mlp.down_proj.weight has shape (64, 96), config.json says (64, 112)"),
        ({"num_hidden_layers": 3}, "holds 2 blocks, config.json says 3"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"attention_bias": True}, "bias"),
        ({"num_key_value_heads": 3}, "3 key heads"),
        ({"num_attention_heads": 0}, "config"),
        ({"hidden_size": -64}, ""),
        ({"hidden_act": "unheard-of"}, "unheard-of"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"model_type": "unheard-of"}, "unheard-of"),
        ({"model_type": "unheard-of", "auto_map": {"AutoConfig": "x.Y"}}, "never run"),
        ({"model_type": "bloom"}, "bloom"),
        ({"model_type": 5}, "model_type"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "already compressed"),
    ],
)
def test_configuration_that_does_not_fit(folder: Path, changes: dict, said: str) -> None:
    edit_config(folder, **changes)
    refused(folder, folder, said)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000], ids=range(5))
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_unreadable_json(folder: Path, file: str, content: bytes) -> None:
    if file == "model.safetensors.index.json":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / file).write_bytes(content)
    refused(folder, folder)


@pytest.mark.parametrize(
    "entries",
    [{"model.norm.weight": "../model.safetensors"}, {"model.norm.weight": "gone.safetensors"}, {}, {"a": 5}],
    ids=range(4),
)
def test_index_that_lies(folder: Path, entries: dict) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))
    refused(folder, folder / "model.safetensors.index.json")


def test_missing_configuration_and_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(folder, folder, "no tokenizer")
    (folder / "config.json").unlink()
    refused(folder, folder, "no config.json")


def test_extra_and_integer_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file(state | {"model.layers.0.extra": torch.ones(2)}, path)
    refused(folder, path, "model.layers.0.extra is unknown")
    save_file(state | {"model.norm.weight": torch.ones(64, dtype=torch.int32)}, path)
    refused(folder, path, "stored as I32")
    save_file(state | {"lm_head.weight": torch.ones(264, 64)}, path)
    refused(folder, path, "lm_head.weight differs")


def test_old_rotary_buffers_and_stored_tied_head_do_no_harm(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    head = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(state | head | buffer, path)
    read_everything(folder)
    assert set(open_checkpoint(folder).names()) == set(state)


def test_compressed_folder_opens_for_facts_only(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors"})
    checkpoint = SafetensorsFolder(folder)
    assert checkpoint.compressed and checkpoint.names() and checkpoint.digest()
    for read in (
        lambda: checkpoint.tensor("model.norm.weight"),
        lambda: checkpoint.rows("model.norm.weight", 0, 1),
    ):
        with pytest.raises(ModelError, match="already compressed"):
            read()


def test_damage_is_found_on_the_way_to_transformers_too(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors"})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="no intact safetensors file"):
        load(folder)


mutations = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
)
quietly = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def mutate(
    content: bytes, header: int, changes: list[tuple[float, int]], put: Callable[[bytes], object]
) -> None:
    damaged = bytearray(content)
    for place, value in changes:  # half of the places lie in the header
        span = header if place < 0.5 else len(content)
        damaged[int((place * 2 % 1) * span)] = value
    put(bytes(damaged))


def refusal(model: Path) -> str:
    """The error that reading everything ends in, or nothing; any other exception fails the test."""
    try:
        read_everything(model)
    except ModelError as error:
        return str(error)
    return ""


@quietly
@given(changes=mutations)
def test_mutated_gguf_loads_or_is_refused(tiny_gguf: Path, tmp_path: Path, changes: list) -> None:
    path = tmp_path / "mutated.gguf"
    mutate(tiny_gguf.read_bytes(), 5900, changes, path.write_bytes)
    message = refusal(path)
    assert not message or (str(path) in message and "\n" not in message)


@quietly
@given(changes=mutations)
def test_mutated_safetensors_load_or_are_refused(tiny_folder: Path, folder: Path, changes: list) -> None:
    intact = (tiny_folder / "model.safetensors").read_bytes()
    mutate(intact, 2050, changes, (folder / "model.safetensors").write_bytes)
    message = refusal(folder)
    assert not message or (str(folder) in message and "\n" not in message)


@quietly
@given(content=st.binary(max_size=200))
def test_noise_behind_the_magic_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + content)
    refused(path, path)
