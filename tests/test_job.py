"""A job: what decides it, where its work lies, how it goes on, and how it refuses to."""

import json

import pytest
import torch

from frugallm.conformance.block_methods import Killed, KilledAfter
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import DataError, OutputError
from frugallm.job import Workplace, compress, layer_facts, needs_text
from frugallm.models.in_memory import InMemory
from frugallm.progress import Progress
from frugallm.recipe import Recipe

STEPS = ("smoothquant:token=[*.o_proj]", "gptq:bits=8,group_size=-1", "embedding")


def job(*steps, kind="tied", tokens=None, **options):
    checkpoint = InMemory(random_model(kind))
    return job_for(
        checkpoint, Recipe.parse(steps or STEPS).steps, windows(kind) if tokens is None else tokens, **options
    )


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_composed_recipe_killed_anywhere_ends_in_the_same_bytes(kind, tmp_path):
    whole = carry_out(job(kind=kind), tmp_path / "whole")
    out = tmp_path / "killed"
    for number, blocks in enumerate((1, 2)):
        with pytest.raises(Killed):
            carry_out(job(kind=kind), out, KilledAfter(blocks), resume=number > 0)
    assert carry_out(job(kind=kind), out, resume=True).digest() == whole.digest()


@pytest.mark.parametrize("part", ["embedding", "block-00000", "block-00001", "final"])
def test_a_part_that_is_missing_is_made_again_as_it_was(part, tmp_path):
    done = carry_out(job(), tmp_path / "out")
    before = done.digest()
    done.place.shard(part).unlink()
    assert carry_out(job(), tmp_path / "out", resume=True).digest() == before


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"steps": ("gptq:bits=3",)}, "recipe"),
        ({"tokens": windows("tied")[:3]}, "tokens.samples was 6, is 3"),
        ({"tokens": windows("tied") * 0}, "tokens.digest"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"stored": torch.float16}, 'dtype was "bfloat16", is "float16"'),
        ({"kind": "untied"}, "model.digest"),
    ],
)
def test_another_job_is_refused_with_what_differs(changed, says, tmp_path):
    place = Workplace(tmp_path / "out")
    place.prepare(job(), resume=False, overwrite=False)
    steps = changed.pop("steps", STEPS)
    with pytest.raises(OutputError, match=f"belongs to another job: .*{says}"):
        place.prepare(job(*steps, **changed), resume=True, overwrite=False)
    assert place.prepare(job(), resume=True, overwrite=False)


def test_what_is_in_the_way_is_refused_and_overwritten_on_request(tmp_path):
    place = Workplace(tmp_path / "out")
    place.prepare(job(), resume=False, overwrite=False)
    with pytest.raises(OutputError, match=r"holds an unfinished run.*--resume"):
        place.prepare(job(), resume=False, overwrite=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"out exists.*--overwrite"):
        place.prepare(job(), resume=False, overwrite=False)
    with pytest.raises(OutputError, match=r"is no result of a run"):
        place.prepare(job(), resume=True, overwrite=False)
    assert place.prepare(job(), resume=False, overwrite=True)
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_has_its_name_and_nothing_lies_beside_it(tmp_path):
    done = carry_out(job(), tmp_path / "deep" / "out")
    done.place.finish()
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["out"]
    assert {"config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "deep" / "out").iterdir()}


def test_text_is_needed_where_a_step_reads_it(tmp_path):
    needs = {"rtn": False, "embedding": False, "gptq": True, "smoothquant": True}
    assert {name: needs_text(job(name).plan) for name in needs} == needs
    assert needs_text(job("smoothquant:sites=[]").plan)  # static scales come from text
    place = Workplace(tmp_path / "out")
    place.path.mkdir()
    without = job_for(
        InMemory(random_model("tied")),
        Recipe.parse(["rtn:only=[*.mlp.*]", "gptq:skip=[*.mlp.*]"]).steps,
        None,
    )
    with pytest.raises(DataError, match="reads calibration text"):
        compress(without, place, Progress())
    assert list(place.path.iterdir()) == []


def test_facts_of_every_linear_are_kept(tmp_path):
    done = carry_out(job("gptq:bits=3"), tmp_path / "out")
    facts = layer_facts(done.job, done.place)
    assert [fact["name"] for fact in facts] == list(done.job.plan.linears)
    for fact in facts:
        assert 0 < fact["error"] < fact["baseline_error"] < 1
        assert 0 < fact["weight_error"] < 1
        assert fact["scheme"] == "W3 g32 symmetric" and fact["step"] == "gptq"
    assert json.dumps(facts)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_what_is_not_compressed_is_stored_as_asked(stored, tmp_path):
    done = carry_out(job("rtn:only=[*.mlp.*]", stored=stored), tmp_path / "out")
    tensors, checkpoint = done.tensors(), done.job.checkpoint
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(tensors[name], checkpoint.tensor(name).to(stored))
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == str(stored).removeprefix(
        "torch."
    )
