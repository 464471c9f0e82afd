"""The whole command on a small model: its events, its folder, and the folder in programs without us."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import frugallm
from frugallm.compress.plan import make_plan
from frugallm.errors import ModelError
from frugallm.formats.stored import Stored, model_in_memory
from frugallm.formats.verify import ROUNDED_INPUT_TOLERANCE, WEIGHT_ONLY_TOLERANCE, relative_error
from frugallm.job import Workplace
from frugallm.models import open_checkpoint
from frugallm.progress import Progress
from frugallm.recipe import Recipe
from small_job import BLOCKS, LENGTH, SAMPLES, SmallJob, fixed_files, write_model, write_text

STEPS = ("smoothquant", "gptq:bits=4", "embedding:bits=8")
OUR_FILES = {"README.md", "manifest.json", "measurements.json", "report.html"}
MODEL_FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
}
IDS = torch.arange(4, 4 + 2 * 40).view(2, 40)
#: The default way of loading a folder, in a process that cannot import FrugalLM.
OUTSIDE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "frugallm":
            raise ImportError("frugallm is not here")
sys.meta_path.insert(0, Refuse())
try:
    import frugallm
except ImportError:
    pass
else:
    sys.exit("frugallm can be imported")
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, answer = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = torch.arange(4, 84).view(2, 40)
with torch.inference_mode():
    logits = model(ids).logits.contiguous()
    out = model.generate(**tokenizer("the of and", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 4 and tokenizer.decode(out[0])
save_file({"logits": logits, "chat": torch.tensor([bool(tokenizer.chat_template)])}, answer)
"""


@dataclass(frozen=True)
class Finished:
    """What one ``frugal run`` gave."""

    job: SmallJob
    events: list[dict[str, Any]]
    shown: str


class Heard(Progress):
    """Keeps events with what lay on the disk when they came."""

    def __init__(self, partial: Path) -> None:
        super().__init__()
        self.partial = partial
        self.events: list[tuple[str, dict[str, Any], set[str]]] = []

    def event(self, kind: str, **facts: Any) -> None:
        there = {p.name for p in self.partial.iterdir()} if self.partial.exists() else set()
        self.events.append((kind, facts, there))

    def warnings(self) -> list[str]:
        return [facts["text"] for kind, facts, _ in self.events if kind == "warn"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("end-to-end")
    write_model(place / "model")
    write_text(place / "text.txt")
    write_text(place / "held-out.txt", seed=1)
    return place


@pytest.fixture(scope="module")
def finished(place) -> Finished:
    job = SmallJob(place / "model", place / "text.txt", STEPS, place / "finished")
    more = ["--eval-text", str(place / "held-out.txt"), "--windows", "3", "--progress", "json"]
    line = [str(Path(sys.executable).with_name("frugal")), *job.command(*more)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return Finished(job, [json.loads(text) for text in done.stderr.splitlines()], done.stdout)


def logits_outside(folder: Path, scratch: Path) -> Tensor:
    """Return the logits of a folder in plain transformers, without us."""
    answer = scratch / "answer.safetensors"
    line = [sys.executable, "-c", OUTSIDE, str(folder), str(answer)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=scratch, env=environment)
    assert done.returncode == 0, done.stderr
    tensors = load_file(answer)
    assert bool(tensors["chat"])
    return tensors["logits"]


def logits_here(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def in_memory(job: SmallJob) -> Any:
    """Return the model that the walk left in memory: the stored values by the plan, inputs rounded as it says."""
    checkpoint = open_checkpoint(job.model)
    plan = make_plan(Recipe.parse(job.steps).steps, checkpoint)
    weights = job.out / "model.safetensors"  # all parts in one file
    return model_in_memory(Stored(checkpoint, plan, lambda _: weights))


# -- one full run ------------------------------------------------------------------------------------------------------


def test_events_are_one_object_a_line(finished):
    assert all(isinstance(event["event"], str) for event in finished.events)
    kinds = [event["event"] for event in finished.events]
    assert kinds[-1] == "done" and kinds.count("start") == kinds.count("done") == 1
    blocks = [event for event in finished.events if event["event"] == "block"]
    assert blocks == [{"event": "block", "index": i, "of": BLOCKS} for i in range(1, BLOCKS + 1)]
    [start] = [event for event in finished.events if event["event"] == "start"]
    assert (start["model"], start["out"]) == (str(finished.job.model), str(finished.job.out))
    done = finished.events[-1]
    assert done["out"] == str(finished.job.out) and done["seconds"] > 0
    assert "warn" not in kinds


def test_the_table_is_printed(finished):
    for word in ("perplexity", "KL", "tokens/s", "bits", "finished/report.html", "AutoModelForCausalLM"):
        assert word in finished.shown, word


def test_a_block_is_durable_before_its_event(place, tmp_path, monkeypatch):
    job = SmallJob(place / "model", place / "text.txt", ("gptq",), tmp_path / "out")
    synced: set[str] = set()
    fsync = os.fsync

    def noted(handle: int) -> None:
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)

    class Checked(Heard):
        def event(self, kind: str, **facts: Any) -> None:
            super().event(kind, **facts)
            if kind == "block":
                shard = f"block-{facts['index'] - 1:05d}.safetensors"
                assert shard in self.events[-1][2] and f"{shard}.tmp" in synced
                assert f"block-{facts['index']:05d}.safetensors" not in self.events[-1][2]

    heard = Checked(Path(f"{job.out}.partial"))
    job.run(progress=heard)
    assert sum(kind == "block" for kind, _, _ in heard.events) == BLOCKS


def test_the_folder_is_complete_and_nothing_else_is_left(finished):
    assert {p.name for p in finished.job.out.iterdir()} == MODEL_FILES | OUR_FILES
    assert not finished.job.out.with_name("finished.partial").exists()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (finished.job.out / name).read_bytes() == (finished.job.model / name).read_bytes()


def test_the_manifest_is_the_same_in_every_run(finished, tmp_path):
    again = replace(finished.job, out=tmp_path / "again")
    again.run()
    assert fixed_files(again.out) == fixed_files(finished.job.out)
    manifest = json.loads((finished.job.out / "manifest.json").read_text())
    job = manifest["job"]
    assert job["recipe"][1] == {"gptq": Recipe.parse(["gptq:bits=4"]).steps[0].settings()}
    assert set(job["recipe"][1]["gptq"]) > {"bits", "group_size", "symmetric", "damp", "act_order"}
    assert job["seed"] == 0 and (job["tokens"]["samples"], job["tokens"]["seq_len"]) == (SAMPLES, LENGTH)
    digests = [job["model"]["digest"], job["text"]["digest"], *manifest["files"].values()]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert set(manifest["files"]) == MODEL_FILES
    assert {"torch", "frugallm"} <= set(job["versions"])


def test_measurements_have_units_spread_and_machine(finished):
    report = json.loads((finished.job.out / "measurements.json").read_text())
    before, after = report["models"]
    for model in (before, after):
        perplexity = model["quality"]["perplexity"]
        assert perplexity["low"] <= perplexity["value"] <= perplexity["high"] and "unit" in perplexity
        for rate in (model["prefill"], model["decode"]):
            assert rate["unit"] == "tokens/s" and rate["repeats"] == 3
            assert 0 < rate["low"] <= rate["value"] <= rate["high"]
        assert model["peak_bytes"] > 0 and model["file_bytes"] > 0
    assert before["quality"]["kl"]["value"] == pytest.approx(0, abs=1e-3)
    assert after["quality"]["kl"]["unit"] == "nats/token"
    assert 4 < after["compressed_bits"] < 9 < after["whole_bits"] + 4
    assert after["file_bytes"] == (finished.job.out / "model.safetensors").stat().st_size
    assert before["whole_bits"] == 16
    assert {"compress", "write", "verify", "evaluate", "speed"} <= set(report["job"]["seconds"])
    assert report["job"]["peak_bytes"] > 0 and report["job"]["machine"]["flags"] is not None
    assert any("verified: loaded by plain transformers" in note for note in report["notes"])


def test_the_page_and_the_card_stand_alone(finished):
    page = (finished.job.out / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html")
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?://', page)
    card = (finished.job.out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense:") and 'library_name: "transformers"' in card
    assert "    gptq" in card and str(finished.job.out) in card


# -- in other programs -------------------------------------------------------------------------------------------------

RECIPES = {
    "w4": (("gptq:bits=4",), WEIGHT_ONLY_TOLERANCE),
    "w8a8 static": (("smoothquant",), ROUNDED_INPUT_TOLERANCE),
    "w8a8 token": (("smoothquant:activation=token", "embedding:bits=8"), ROUNDED_INPUT_TOLERANCE),
    "mixed": (
        ("rtn:bits=8,only=[*.mlp.*]", "gptq:bits=3,skip=[*.mlp.*,*.0.*]", "embedding"),
        WEIGHT_ONLY_TOLERANCE,
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_plain_transformers_computes_what_the_walk_left(name, place, tmp_path):
    steps, tolerance = RECIPES[name]
    job = SmallJob(place / "model", place / "text.txt", steps, tmp_path / "out")
    heard = Heard(Path(f"{job.out}.partial"))
    job.run(progress=heard)
    assert heard.warnings() == []
    expected = logits_here(in_memory(job))
    assert relative_error(logits_outside(job.out, tmp_path), expected) <= tolerance
    model, tokenizer = frugallm.load(job.out)
    assert relative_error(logits_here(model), expected) <= tolerance
    assert tokenizer("the of").input_ids
    with safe_open(job.out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("model.layers.0.mlp.up_proj.input_scale" in names) == (name == "w8a8 static")
    if any(step.startswith("embedding") for step in steps):
        assert "model.embed_tokens.weight_scale" in names and "lm_head.weight" not in names  # tied stays tied
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_an_untied_head_is_stored_by_itself(place, tmp_path):
    write_model(tmp_path / "model", tie_word_embeddings=False)
    job = SmallJob(tmp_path / "model", place / "text.txt", ("rtn", "embedding:bits=8"), tmp_path / "out")
    job.run()
    expected = logits_here(in_memory(job))
    plain = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32)
    assert relative_error(logits_here(plain), expected) <= WEIGHT_ONLY_TOLERANCE
    with safe_open(job.out / "model.safetensors", "pt") as file:
        assert {"lm_head.weight", "lm_head.weight_scale"} <= set(file.keys())


#: What plain transformers does not load: packed tables, zero points, and both with rounded inputs.
ONLY_HERE = {
    "packed embedding": ("rtn:bits=4", "embedding:bits=4"),
    "packed embedding alone": ("embedding:bits=4",),
    "zero points": ("gptq:bits=4,symmetric=false",),
    "zero points, table of 8 bits": ("gptq:bits=3,symmetric=false", "embedding:bits=8"),
    "zero points, static inputs": ("smoothquant", "gptq:bits=8,symmetric=false"),
    "zero points, inputs by token": (
        "smoothquant:activation=token",
        "gptq:bits=4,symmetric=false",
        "embedding:bits=4",
    ),
}


@pytest.mark.parametrize("name", ONLY_HERE)
def test_what_transformers_does_not_load_is_said_before_and_read_by_us(name, place, tmp_path):
    job = SmallJob(place / "model", place / "text.txt", ONLY_HERE[name], tmp_path / "out")
    heard = Heard(Path(f"{job.out}.partial"))
    report = job.run(progress=heard, verify=True)
    [first, *_] = [n for n, (kind, facts, _) in enumerate(heard.events) if "will not load" in str(facts)]
    assert heard.events[first][0] == "warn"
    assert not any(there for _, _, there in heard.events[: first + 1])  # before any work
    assert f'frugallm.load("{job.out}")' in report.how_to_load["FrugalLM"]
    assert "transformers" not in report.how_to_load or report.how_to_load["transformers"].startswith("# not")
    assert any("not verified" in note for note in report.notes)

    model, tokenizer = frugallm.load(job.out)
    assert torch.equal(logits_here(model), logits_here(in_memory(job)))
    assert tokenizer("the of").input_ids
    assert frugallm.load(job.out, dtype=torch.bfloat16)[0].dtype is torch.bfloat16
    with pytest.raises(ModelError, match="already compressed"):
        open_checkpoint(job.out)


def test_stored_values_stay_close_to_the_model(place, tmp_path):
    """In 8 bits nothing much may change; a lost zero point or scale would."""
    original = logits_here(AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32))
    steps = ("smoothquant:activation=token", "gptq:bits=8,symmetric=false", "embedding:bits=8")
    job = SmallJob(place / "model", place / "text.txt", steps, tmp_path / "out")
    job.run()
    assert relative_error(logits_here(frugallm.load(job.out)[0]), original) < 1e-2


def test_a_result_that_does_not_verify_is_no_result(place, tmp_path, monkeypatch):
    from frugallm.errors import JobError
    from frugallm.formats import compressed_tensors

    encode = compressed_tensors.encode_linear

    def wrong(path: str, *args: Any, **options: Any) -> dict[str, Tensor]:
        tensors = encode(path, *args, **options)
        if path == "model.layers.2.mlp.down_proj":
            tensors[f"{path}.weight_packed"] ^= 1 << 3
        return tensors

    job = SmallJob(place / "model", place / "text.txt", ("rtn",), tmp_path / "out")
    decode = compressed_tensors.decode_linear

    def right(path: str, tensors: Any, *args: Any, **options: Any) -> Any:
        if path == "model.layers.2.mlp.down_proj":
            name = f"{path}.weight_packed"
            tensors = {**tensors, name: tensors[name] ^ (1 << 3)}
        return decode(path, tensors, *args, **options)

    monkeypatch.setattr(compressed_tensors, "encode_linear", wrong)
    monkeypatch.setattr(compressed_tensors, "decode_linear", right)
    with pytest.raises(JobError, match="computes something else from block 2 on") as caught:
        job.run(verify=True)
    assert caught.value.status == 1
    assert not job.out.exists() and Workplace(job.out).path.exists()
