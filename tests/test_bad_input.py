"""Bad input to the whole command: one line that says what and where, status 2, and nothing is left behind."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from frugallm.cli.main import main
from frugallm.formats import shards
from frugallm.walk.hidden import HiddenStates
from small_job import SmallJob, fixed_files, listing, write_model, write_text


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("given")
    write_model(place / "model")
    write_text(place / "text.txt")
    return place


@pytest.fixture
def job(given, tmp_path, monkeypatch) -> SmallJob:
    """A good job whose inputs may be damaged, in the working directory."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(given / "model", "model")
    shutil.copy(given / "text.txt", "text.txt")
    return SmallJob(Path("model"), Path("text.txt"), ("gptq:bits=4",), Path("out"))


def refused(arguments: list[str], capsys, says: str, status: int = 2) -> str:
    """Check that a command ends with one line and leaves the working directory as it was; return the line."""
    before = listing(Path.cwd())
    capsys.readouterr()
    assert main([*arguments, "--quiet"]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert says in shown.err, shown.err
    assert "internal error" not in shown.err
    assert listing(Path.cwd()) == before
    return shown.err


def edit_weights(change) -> None:
    path = Path("model/model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.5, 0.999])
def test_truncated_weights(share, job, capsys):
    path = Path("model/model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(job.command(), capsys, "model/model.safetensors")


def test_flipped_bits_in_the_header(job, capsys):
    path = Path("model/model.safetensors")
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    name = content.index(b"mlp.down_proj")
    places = {"length": 1, "brace": 8, "name": name, "dtype": content.index(b'"F32"') + 1, "end": 7 + size}
    for place, at in places.items():
        flipped = bytearray(content)
        flipped[at] ^= 1 << (6 if place == "end" else 1)
        path.write_bytes(flipped)
        refused(job.command(), capsys, "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"]
)
def test_weights_that_are_no_numbers_wherever_they_are_found(name, value, job, capsys):
    edit_weights(lambda tensors: tensors[name].view(-1)[-3:].fill_(value))
    word = "NaN" if value != value else "infinite values"
    line = refused(replace(job, out=Path("new/folder/out")).command(), capsys, f"{name} holds {word}")
    assert "model/model.safetensors" in line


@pytest.mark.parametrize(
    ("more", "says"),
    [("--no-evaluate", "nothing is to be evaluated"), ("--windows=1", "at least two evaluation windows")],
)
def test_shares_that_cannot_be_measured(more, says, job, capsys):
    refused(job.command("--shares", more), capsys, says)


def test_weights_that_are_no_numbers_do_not_take_resumed_work_along(job, capsys):
    from frugallm.conformance.block_methods import Killed, KilledAfter

    with pytest.raises(Killed):
        job.run(progress=KilledAfter(1))
    kept = listing(Path("out.partial"))
    state = Path("out.partial/job.json")
    edit_weights(lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"].view(-1)[:1].fill_(torch.nan))
    refused(job.command("--resume"), capsys, "model.digest was")
    from frugallm.models import open_checkpoint

    content = json.loads(state.read_text())
    content["model"]["digest"] = open_checkpoint("model").digest()  # as if it had been so from the start
    state.write_text(json.dumps(content))
    assert main(job.command("--resume", "--quiet")) == 2
    assert "holds NaN" in capsys.readouterr().err
    assert set(kept) <= set(listing(Path("out.partial")))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 5}, "holds 4 blocks, config.json says 5"),
        ({"intermediate_size": 112}, "has shape (64, 96), config.json says (64, 112)"),
        ({"vocab_size": 9}, "config.json says (9, 64)"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"model_type": "lama"}, "architecture 'lama' is unknown"),
        ({"num_key_value_heads": 3}, "config.json"),
        ({"hidden_size": "wide"}, "config"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "is already compressed"),
    ],
)
def test_a_config_that_does_not_match(change, says, job, capsys):
    path = Path("model/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(job.command(), capsys, says)


def test_a_config_that_is_no_json(job, capsys):
    Path("model/config.json").write_text("{")
    refused(job.command(), capsys, "model/config.json cannot be read as JSON")


def test_pickle_files_are_refused(job, capsys):
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    refused(job.command(), capsys, "pickle files, which can run code and are refused")


def test_a_damaged_tokenizer(job, capsys):
    Path("model/tokenizer.json").write_text("{}")
    refused(job.command(), capsys, "the tokenizer cannot be read")
    Path("model/tokenizer.json").unlink()
    refused(job.command(), capsys, "has no tokenizer")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2-135", "did you mean 'smollm2-135m'?"),
        ("nobody/nothing", "the Hugging Face hub cannot be reached"),
        ("model/modell", "there is no file or folder 'model/modell'"),
        ("text.txt", "text.txt is no model file"),
        ("model/model.safetensors", "Give the folder that also holds config.json"),
        ("", "''"),
    ],
)
def test_a_model_that_is_not_there_is_answered_soon(name, says, job, capsys):
    started = time.monotonic()
    refused(["run", name, *job.command()[2:]], capsys, says)
    assert time.monotonic() - started < 20


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ("", "a recipe needs at least one step"),
        ("gptqq", "no method 'gptqq' (step 1). did you mean 'gptq'?"),
        ("smoothquant rnt", "no method 'rnt' (step 2). did you mean 'rtn'?"),
        ("gptq:bit=4", "gptq has no parameter 'bit' (step 1). did you mean 'bits'?"),
        ("gptq:bits=9", "bits must be 2, 3, 4, 5, 6, 7 or 8; got 9"),
        ("gptq:bits=four", "bits must be"),
        ("gptq:damp=-0.1", "damp must be greater than or equal to 0; got -0.1"),
        ("gptq:symmetric=perhaps", "symmetric must be"),
        ("gptq:bits", "gptq:bits"),
        ("gptq:bits=4,bits=3", "bits"),
        ("embedding:bits=3", "bits must be 4, 5, 6, 7 or 8; got 3"),
        ("gptq smoothquant", "Put smoothquant before gptq"),
        ("rtn gptq", "would be rounded twice"),
        ("gptq gptq", "would be rounded twice"),
        ("embedding embedding", "embedding stands twice"),
        ("smoothquant smoothquant", "both scale the input of"),
        ("gptq:group_size=128", "Sizes that fit: 16, 32; -1 is one scale a row"),
        ("gptq:group_size=0", "group_size 0 does not divide"),
        ("gptq:group_size=-2", "group_size must be"),
        ("embedding:bits=4,group_size=48", "Sizes that fit: 16, 32, 64"),
        ("gptq:skip=[*.down]", "skip pattern '*.down' matches no linear. Names look like"),
        ("gptq:only=[model.layers.9.*]", "only pattern 'model.layers.9.*' matches no linear"),
        ("gptq:skip=[*]", "is left with no linear to work on"),
        ("smoothquant:token=[*.lm_head]", "token pattern '*.lm_head' matches no linear"),
    ],
)
def test_steps(steps, says, job, capsys):
    refused(replace(job, steps=tuple(steps.split())).command(), capsys, says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "steps:\n  - gptq: {bits: 4}\n  - embedding:\n      bitz: 8\n",
            "my.yaml, line 4). did you mean 'bits'?",
        ),
        ("steps:\n  - gptq\nstepz: 3\n", "a recipe has no key 'stepz' (my.yaml, line 3)"),
        ("steps:\n  - gptq: {bits: 99}\n", "(my.yaml, line 2)"),
        ("steps:\n  - gqtp\n", "(my.yaml, line 2). did you mean 'gptq'?"),
        ("title: nothing\n", "my.yaml: a recipe needs at least one step"),
        ("steps: [gptq\n", "my.yaml, line 2: not valid YAML"),
        ("\0\x01", "my.yaml"),
    ],
)
def test_recipe_files(content, says, job, capsys):
    Path("my.yaml").write_text(content)
    refused([*replace(job, steps=()).command(), "--recipe", "my.yaml"], capsys, says)


def test_a_missing_recipe(job, capsys):
    refused([*replace(job, steps=()).command(), "--recipe", "w4a61"], capsys, "did you mean 'w4a16'?")
    refused([*replace(job, steps=()).command(), "--recipe", "your.yaml"], capsys, "no recipe file your.yaml")


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [("gptq",), ("rtn",)])
@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--samples 0", "samples must be 1 or more"),
        ("--samples -3", "samples must be 1 or more"),
        ("--samples many", "'--samples': Input should be a valid integer"),
        ("--seq-len 1", "seq_len must be 2 or more"),
        ("--windows 0", "windows must be 1 or more"),
        ("--threads 0", "threads must be 1 or more"),
        ("--seed -1", "seed must be 0 or more"),
        ("--seed 99999999999999999999", "seed must be 0 or more, in 63 bits"),
        ("--dtype bf61", "dtype must be one of bf16, fp16, fp32; got 'bf61'. did you mean 'bf16'?"),
        ("--device cuda", "device 'cuda' is not supported yet"),
        ("--progress nonsense", "progress must be one of auto, bar, json, none; got 'nonsense'"),
        ("--sample 3", "--samples"),
        ("--windows 1000", "tokens; 1000 x 128 need 128,000. windows="),
    ],
)
def test_options(option, says, steps, job, capsys):
    more = option.split()
    if more[0] == "--windows":
        more += ["--eval-text", "text.txt"]
    refused(replace(job, steps=steps).command(*more), capsys, says)


def test_windows_longer_than_the_context(job, capsys):
    refused(
        job.command("--seq-len", "129"), capsys, "seq_len 129 is beyond the model's context of 128 tokens"
    )


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--text", "--eval-text"])
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "the text empty.txt is empty"),
        ("blank.txt", b" \n\n ", "the text blank.txt is empty"),
        ("short.txt", b"the of and", "the text short.txt has"),
        ("zeros.txt", b"text\0more", "zeros.txt is binary, not text"),
        ("image.txt", b"\x89PNG\r\n\xff\xfe", "image.txt is not UTF-8 (byte 0)"),
        ("rows.jsonl", b'{"text": "the"}\n{"txt": "of"}\n', "rows.jsonl, record 2 has no field 'text'"),
        ("rows.jsonl", b'{"text": "the"\n', "rows.jsonl, line 1 is no JSON"),
        ("missing.txt", None, "missing.txt"),
        ("folder/", None, "folder"),
    ],
)
def test_texts(option, name, content, says, job, capsys):
    if content is not None:
        Path(name).write_bytes(content)
    refused(job.command(option, name), capsys, says)


def test_a_folder_without_texts(job, capsys):
    Path("images").mkdir()
    refused(job.command("--text", "images"), capsys, "no *.txt or *.md file in the folder images")


def test_a_missing_text_does_not_cost_the_old_result(job, capsys):
    job.run()
    refused(job.command("--overwrite", "--eval-text", "missing.txt"), capsys, "missing.txt")
    refused(job.command("--overwrite", "--text", "missing.txt"), capsys, "missing.txt")


# -- places ------------------------------------------------------------------------------------------------------------


def test_what_is_in_the_way(job, capsys):
    Path("out").mkdir()
    refused(job.command(), capsys, "out exists. Choose another --out, or --overwrite it")
    refused(job.command("--resume"), capsys, "out is no result of a run")
    Path("out").rmdir()
    Path("out").write_text("a file")
    refused(job.command(), capsys, "out exists")
    refused(job.command("--overwrite"), capsys, "out is no result of a run and is not overwritten")
    Path("out").unlink()
    Path("out").symlink_to("nowhere")
    refused(job.command(), capsys, "out exists")


@pytest.mark.parametrize("out", [".", "..", "/", "model", "text.txt"])
def test_places_that_are_no_new_folder(out, job, capsys):
    refused(replace(job, out=Path(out)).command(), capsys, "")
    refused(replace(job, out=Path(out)).command("--overwrite"), capsys, "")


def test_no_place(job, capsys):
    refused(["run", "model", "gptq"], capsys, "Add --out DIR")


def test_a_target_that_cannot_be_written_is_a_failure(job, capsys):
    out = replace(job, out=Path("text.txt/out"))
    line = refused(out.command(), capsys, "Not a directory", status=1)
    assert "Choose a place that can be written" in line


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that refuses everybody")
def test_a_read_only_target_is_a_failure(job, capsys):
    refused(replace(job, out=Path("/proc/self/out")).command(), capsys, "/proc/self/out.partial", status=1)


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["embedding", "block-00002", "final", "folder/model", "folder/report"])
def test_a_full_disk_keeps_the_state(part, job, capsys, monkeypatch):
    written = shards.sync

    def full(path: Path) -> None:
        if part in str(path):
            raise OSError(28, "No space left on device", str(path))
        written(path)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "sync", full)
        assert main(job.command("--quiet", "--no-evaluate")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: No space left on device: ") and "Free some space" in shown
    assert shown.count("\n") == 1
    assert not Path("out").exists()
    job.run(resume=True)
    whole = replace(job, out=Path("whole"))
    whole.run()
    assert fixed_files(job.out) == fixed_files(whole.out)


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from frugallm.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_files_that_the_system_cuts_off_keep_the_state(job):
    line = [sys.executable, "-c", FULL, *job.command("--quiet", "--no-evaluate")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: File too large: out.partial/embedding.safetensors.tmp. ")
    assert done.stderr.count("\n") == 1
    assert not Path("out").exists() and Path("out.partial/job.json").exists()
    job.run(resume=True)
    assert Path("out/model.safetensors").exists()


def test_hidden_states_that_do_not_fit_the_disk_are_an_error_not_a_signal(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            HiddenStates((4, 16, 64), torch.float32, tmp_path / "hidden.bin", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
