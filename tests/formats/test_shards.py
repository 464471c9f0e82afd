import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from frugallm.formats import shards


@pytest.fixture
def parts(tmp_path):
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float32, torch.bfloat16, torch.int8, torch.int32]
    contents = [
        {f"{part}.{kind}": (torch.randn(3 + part, 5, generator=generator) * 50).to(kind) for kind in kinds}
        | {f"{part}.empty": torch.empty(0, 4), f"{part}.scalar": torch.tensor([7])}
        for part in range(4)
    ]
    paths = [tmp_path / f"part-{i}.safetensors" for i in range(4)]
    for path, content in zip(paths, contents):
        shards.write_shard(path, content)
    return paths, {name: tensor for content in contents for name, tensor in content.items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


def test_a_shard_holds_what_was_written(tmp_path):
    transposed = torch.arange(6.0).view(2, 3).T
    shards.write_shard(tmp_path / "a", {"t": transposed})
    same(shards.read_shard(tmp_path / "a"), {"t": transposed})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_merged_shards_are_one_file(parts, tmp_path):
    paths, wanted = parts
    folder = tmp_path / "out"
    folder.mkdir()
    shards.merge(paths, folder)
    assert [p.name for p in folder.iterdir()] == ["model.safetensors"]
    same(load_file(folder / "model.safetensors"), wanted)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("limit", [1, 1200, 2000])
def test_past_the_limit_there_are_several_files_and_an_index(parts, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(shards, "MAX_FILE_BYTES", limit)
    monkeypatch.setattr(shards, "_COPY_BYTES", 64)
    paths, wanted = parts
    folder = tmp_path / "out"
    folder.mkdir()
    shards.merge(paths, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 1 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    found = {}
    for file in files:
        content = load_file(folder / file)
        assert all(index["weight_map"][name] == file for name in content)
        found.update(content)
    same(found, wanted)
    assert index["metadata"]["total_size"] == sum(math.prod(t.shape) * t.itemsize for t in wanted.values())


def test_split_files_load_in_transformers(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from frugallm.conformance.trial import carry_out, job_for, random_model, windows
    from frugallm.formats.stored import model_in_memory
    from frugallm.models.in_memory import InMemory
    from frugallm.recipe import Recipe

    monkeypatch.setattr(shards, "MAX_FILE_BYTES", 40_000)
    job = job_for(InMemory(random_model("untied")), Recipe.parse(["rtn"]).steps, windows("untied"))
    run = carry_out(job, tmp_path / "run")
    assert len(list(run.folder.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(str(run.folder), dtype=torch.float32)
    with torch.no_grad():
        logits, wanted = (
            m(windows("untied")).logits for m in (model, model_in_memory(run.place.stored(job)))
        )
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("before", [None, {"old": torch.ones(3)}])
@pytest.mark.parametrize("step", ["save_file", "sync"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, before, step):
    path = tmp_path / "a.safetensors"
    if before is not None:
        shards.write_shard(path, before)
    save = shards.save_file

    def fail(*arguments, **_):
        if step == "save_file":
            save({"half": torch.zeros(1)}, arguments[1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, step, fail)
    with pytest.raises(OSError, match="No space left"):
        shards.write_shard(path, {"new": torch.zeros(4)})
    assert path.exists() == (before is not None)
    if before is not None:
        same(load_file(path), before)


def test_bytes_are_written_whole_or_not(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    shards.write_bytes(path, b"one")

    def fail(_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(shards, "sync", fail)
        with pytest.raises(OSError, match="Input/output"):
            shards.write_bytes(path, b"two")
    assert path.read_bytes() == b"one"
    shards.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
