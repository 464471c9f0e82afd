"""Pruning through the whole command: zeros in the folder, in plain transformers, and in what is said about them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from frugallm.cli.main import main
from frugallm.conformance import families
from frugallm.conformance.trial import carry_out, job_for
from frugallm.formats.engines import loads_in_transformers
from frugallm.formats.stored import model_in_memory
from frugallm.models import load, open_checkpoint
from frugallm.models.in_memory import InMemory
from frugallm.models.open import load_plain
from frugallm.progress import Progress
from frugallm.recipe import Recipe
from small_job import SmallJob, fixed_files, write_model, write_text


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return write_model(folder / "model"), write_text(folder / "text.txt")


def is_linear(name):
    return ".layers." in name and name.endswith("proj.weight")


def groups_of_zeros(weight, group):
    return (weight == 0).view(len(weight), -1, group).sum(-1)


def test_a_pruned_folder_is_a_plain_one_with_zeros(sources, tmp_path):
    model, text = sources
    job = SmallJob(model, text, ("magnitude:pattern=2:4",), tmp_path / "out")
    report = job.run(verify=True)
    config = json.loads((job.out / "config.json").read_text())
    assert "quantization_config" not in config
    before, stored = open_checkpoint(model), load_file(job.out / "model.safetensors")
    assert set(stored) == set(before.names())
    outside = AutoModelForCausalLM.from_pretrained(job.out).state_dict()
    ours, _ = load(job.out)
    for name, tensor in stored.items():
        original = before.tensor(name).to(tensor.dtype)
        if is_linear(name):
            assert (groups_of_zeros(tensor, 4) == 2).all()
            assert torch.equal(tensor, original.where(tensor != 0, 0))
        else:  # tables and norms are never pruned
            assert torch.equal(tensor, original)
        assert torch.equal(outside[name].float(), tensor.float())
        assert torch.equal(ours.state_dict()[name].float(), tensor.float())
    after = report.models[1]
    assert after.zeros == 0.5 and report.models[0].zeros is None
    assert report.zeros == {n.removesuffix(".weight"): 0.5 for n in before.names() if is_linear(n)}
    assert after.compressed_bits == 16 and after.file_bytes >= sum(after.part_bytes.values())
    card = (job.out / "README.md").read_text()
    assert "neither smaller nor faster" in card and "zeros in pruned linears | – | 50.0 %" in card
    assert "verified: loaded by plain transformers" in card
    assert '"compressed-tensors"' not in card.split("---")[1]
    assert "vllm serve" in report.how_to_load["vLLM"]
    assert f"frugal export {job.out} --to gguf:BF16" in report.how_to_load["llama.cpp"]


@pytest.mark.parametrize("steps", [("magnitude", "gptq:bits=4"), ("magnitude", "rtn:bits=3", "embedding")])
def test_zeros_stay_when_a_later_step_rounds(sources, tmp_path, steps):
    model, text = sources
    job = SmallJob(model, text, steps, tmp_path / "out")
    report = job.run()
    before = open_checkpoint(model)
    outside = load(job.out)[0].state_dict()
    counted = []
    for name in filter(is_linear, before.names()):
        weight = before.tensor(name).bfloat16().float()
        smallest = weight.abs().flatten().kthvalue(weight.numel() // 2).values
        assert not outside[name][weight.abs() < smallest].any()
        counted.append((outside[name] == 0).float().mean())
    assert 0.5 <= report.models[1].zeros == pytest.approx(float(torch.stack(counted).mean()), abs=1e-3)
    assert report.models[1].compressed_bits < 9


def test_a_killed_run_of_both_ends_in_the_same_bytes(sources, tmp_path):
    model, text = sources
    whole = SmallJob(model, text, ("magnitude", "gptq:bits=3"), tmp_path / "whole")
    whole.run()
    broken = SmallJob(model, text, whole.steps, tmp_path / "broken")

    class Stop(Exception):
        pass

    class StopAfterTwo(Progress):
        def event(self, kind, **facts):
            if kind == "block" and facts["index"] == 2:
                raise Stop

    with pytest.raises(Stop):
        broken.run(progress=StopAfterTwo())
    broken.run(resume=True)
    assert fixed_files(whole.out) == fixed_files(broken.out)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gemma3", "mixtral", "olmoe"])
@pytest.mark.parametrize("step", ["wanda:pattern=2:4", "sparsegpt:sparsity=0.6"])
def test_every_kind_of_family_is_pruned_along_its_inputs_and_loads(name, step, tmp_path):
    """Turned linears and fused experts too: dense, so that plain transformers loads them as it would the original."""
    job = job_for(InMemory(families.variant(name)), Recipe.parse([step]).steps, families.tokens())
    run = carry_out(job, tmp_path / "run")
    outside, stored = load_plain(run.folder, torch.float32), run.place.stored(job)
    assert loads_in_transformers(job.plan) and set(job.plan.pruned) == set(job.checkpoint.linears())
    for linear in job.plan.pruned:
        zeros = stored.tensor(f"{linear}.weight") == 0
        if "2:4" in step:
            assert (zeros.view(len(zeros), -1, 4).sum(-1) == 2).all(), linear
        else:
            assert abs(zeros.float().mean() - 0.6) < 2 / zeros.shape[1], linear
    with torch.inference_mode():
        logits = outside(families.tokens()).logits
        wanted = model_in_memory(stored)(families.tokens()).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_pattern_that_does_not_fit_is_one_line_and_leaves_nothing(sources, tmp_path, capfd):
    model, text = sources
    job = SmallJob(model, text, ("magnitude:pattern=2:4,sparsity=0.6",), tmp_path / "out")
    assert main(job.command()) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert "magnitude: pattern 2:4 makes 0.5 of the weights zero, not sparsity 0.6" in said
    assert list(tmp_path.iterdir()) == []
