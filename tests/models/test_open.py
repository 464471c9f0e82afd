"""Every way to name a model gives the same plain transformers model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_model
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from frugallm.errors import ModelError
from frugallm.models import InMemory, SafetensorsFolder, dense_model, load, open_checkpoint
from packed_folders import scatter

IDS = torch.tensor([[3, 50, 7, 99, 12, 200, 4, 4, 31]])


def test_one_model_from_everywhere(tiny_gguf: Path, tiny_folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    expected = plain(IDS).logits
    for source in (tiny_gguf, str(tiny_gguf), tiny_folder, str(tiny_folder), open_checkpoint(tiny_folder)):
        model, tokenizer = load(source)
        assert torch.equal(model(IDS).logits, expected)
        assert tokenizer("the").input_ids == [tokenizer.convert_tokens_to_ids("the")]
    assert torch.equal(dense_model(open_checkpoint(plain))(IDS).logits, expected)


def test_dense_model_is_ready_for_use(tiny_folder: Path, tmp_path: Path) -> None:
    model = dense_model(open_checkpoint(tiny_folder), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (2, 1)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_types_are_kept(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(path).items()}, path)
    checkpoint = open_checkpoint(folder)
    assert {checkpoint.tensor(name).dtype for name in checkpoint.names()} == {dtype}


def test_sharded_folder_equals_the_single_file(tiny_folder: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(tiny_folder)
    dense_model(whole).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded = open_checkpoint(tmp_path)
    assert sharded.names() == whole.names()
    for name in whole.names():
        assert torch.equal(sharded.tensor(name), whole.tensor(name))
        assert torch.equal(sharded.rows(name, 1, 9), whole.tensor(name)[1:9])


def test_shards_may_have_any_names(tiny_folder: Path, folder: Path) -> None:
    whole = open_checkpoint(tiny_folder)
    names = ["model-00002-of-00007.safetensors", "a b.safetensors", "q.fp32.safetensors", "ä-{x}.safetensors"]
    scatter(folder, names)
    (folder / "stray.safetensors").write_bytes(b"not listed, not read")
    sharded = open_checkpoint(folder)
    assert sharded.names() == whole.names()
    assert all(torch.equal(sharded.tensor(name), whole.tensor(name)) for name in whole.names())
    assert torch.equal(load(folder)[0](IDS).logits, dense_model(whole)(IDS).logits)


def test_a_single_file_counts_before_an_index(tiny_folder: Path, folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).digest() == open_checkpoint(tiny_folder).digest()


def test_tensors_are_fresh(tiny_folder: Path) -> None:
    for checkpoint in (open_checkpoint(tiny_folder), InMemory(tiny_model())):
        for name in checkpoint.names():
            before = checkpoint.tensor(name)
            checkpoint.tensor(name).zero_()
            checkpoint.rows(name, 0, 2).zero_()
            assert torch.equal(checkpoint.tensor(name), before)


def test_digest_is_of_the_content(tiny_folder: Path, folder: Path) -> None:
    first = SafetensorsFolder(tiny_folder).digest()
    assert SafetensorsFolder(folder).digest() == first
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert SafetensorsFolder(folder).digest() != first
    model = tiny_model()
    before = InMemory(model).digest()
    assert before == InMemory(tiny_model()).digest()
    model.model.norm.weight[3] += 1
    assert InMemory(model).digest() != before


def test_companions_travel(tiny_folder: Path) -> None:
    companions = open_checkpoint(tiny_folder).companions()
    expected = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    }
    assert set(companions) == expected
    assert companions["LICENSE"] == b"do what you like\n"


def test_block_state_is_relative(tiny_folder: Path) -> None:
    checkpoint = open_checkpoint(tiny_folder)
    block = dense_model(checkpoint).model.layers[1]
    state = checkpoint.block_state(1)
    assert state.keys() == block.state_dict().keys()
    assert torch.equal(state["mlp.up_proj.weight"], block.mlp.up_proj.weight)


def test_license_of_the_model_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    assert SafetensorsFolder(folder).metadata == {"name": "model", "license": "apache-2.0"}


def test_model_in_memory_and_its_tokenizer(tiny_folder: Path) -> None:
    model, tokenizer = load(tiny_folder)
    checkpoint = open_checkpoint(model, tokenizer)
    assert checkpoint.tokenizer is tokenizer
    assert {"tokenizer.json", "generation_config.json"} <= checkpoint.companions().keys()
    with pytest.raises(ModelError, match="without a tokenizer"):
        assert open_checkpoint(model).tokenizer


def test_other_architectures_load_but_are_not_compressed(tiny_folder: Path, tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2)
    other = BloomForCausalLM(config).eval()
    other.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    model, _ = load(tmp_path)
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    with pytest.raises(ModelError, match="'bloom' is not supported"):
        open_checkpoint(tmp_path)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="got int"):
        open_checkpoint(5)  # type: ignore[arg-type]


def test_names_come_without_heavy_imports() -> None:
    code = "import sys, frugallm.models; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
