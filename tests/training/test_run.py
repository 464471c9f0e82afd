"""The training job: what it writes, how it is refused, how it goes on."""

import json
import shutil

import pytest
import torch

import frugallm
from frugallm.cli.main import main
from frugallm.errors import FrugalError, JobError
from frugallm.progress import Progress
from frugallm.training.loop import last_checkpoint
from frugallm.training.run import CHECKPOINTS
from small_training import small_training


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A finished training without steps, and its report."""
    out = tmp_path_factory.mktemp("plain") / "out"
    return out, small_training([], out, max_steps=30, learning_rate=1e-2)


def test_training_lowers_the_loss_on_held_out_text(plain):
    out, report = plain
    assert report.after.perplexity.value < report.before.perplexity.value / 2
    assert report.curve[-1]["loss"] < report.curve[0]["loss"]
    assert report.tokens == 30 * 2 * 32
    files = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "manifest.json", "README.md"} <= files
    assert not out.with_name("out.partial").exists()
    assert any("verified" in note for note in report.notes)
    table = (out / "README.md").read_text()
    assert f"{report.after.perplexity.value:.2f}" in table


def test_what_was_trained_is_a_model_for_every_other_command(plain, tmp_path):
    out, _ = plain
    _, tokenizer = frugallm.load(out)
    assert tokenizer("the cat")["input_ids"]
    compressed = frugallm.run(str(out), ["rtn:bits=8"], out=tmp_path / "small", evaluate=False, verify=False)
    assert compressed.models
    again = small_training(
        [], tmp_path / "further", max_steps=2, from_scratch=False, shape=None, model=str(out)
    )
    assert again.before.kl.value == pytest.approx(0, abs=1e-6)
    assert not again.from_scratch


def test_a_finished_training_is_not_done_again(plain, capsys):
    out, report = plain
    seen = []

    class Listen(Progress):
        def event(self, kind, **facts):
            seen.append(kind)

    again = small_training([], out, max_steps=30, learning_rate=1e-2, resume=True, progress=Listen())
    assert again == report
    assert "step" not in seen
    with pytest.raises(FrugalError, match="belongs to another job: max_steps was 30, is 31"):
        small_training([], out, max_steps=31, learning_rate=1e-2, resume=True)


class Interrupt(Progress):
    """Presses Ctrl-C at a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def event(self, kind, **facts):
        if kind == "step" and facts["index"] == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["none", "half a checkpoint"])
def test_an_interrupted_training_goes_on_to_the_same_bytes(tmp_path, damage):
    options = {"max_steps": 8, "save_every": 3, "evaluate": False, "verify": False}
    small_training(["bitnet"], tmp_path / "whole", **options)
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        small_training(["bitnet"], out, progress=Interrupt(7), **options)
    kept = out.with_name("broken.partial") / CHECKPOINTS
    assert last_checkpoint(kept).name == "checkpoint-6"
    if damage != "none":
        (kept / "checkpoint-6" / "complete").unlink()
        (kept / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
        assert last_checkpoint(kept).name == "checkpoint-3"
    with pytest.raises(FrugalError, match="unfinished run"):
        small_training(["bitnet"], out, **options)
    steps = []

    class Listen(Progress):
        def event(self, kind, **facts):
            if kind == "step":
                steps.append(facts["index"])

    small_training(["bitnet"], out, resume=True, progress=Listen(), **options)
    assert steps[0] == (7 if damage == "none" else 4)
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        ([], {"from_scratch": False}, "shape without weights"),
        (["rtn"], {}, "does not act while a model is trained"),
        (["bitnet", "bitnet:norm=false"], {}, "stands twice"),
        (["bitnet:wieghts=binary"], {}, "did you mean 'weights'"),
        ([], {"shape": {"hiden_size": 32}}, "did you mean 'hidden_size'"),
        ([], {"shape": {"hidden_size": "wide"}}, "hidden_size is 128"),
        ([], {"shape": {"hidden_size": 33}}, "--shape"),
        ([], {"seq_len": 4096}, "beyond the model's context of 1024"),
        ([], {"learning_rate": -1.0}, "learning_rate must be more than 0"),
        ([], {"max_steps": 0}, "max_steps must be 1 or more"),
        ([], {"dtype": "int8"}, "dtype must be one of"),
        ([], {"text": "/no/such/text"}, "/no/such/text"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(tmp_path, steps, options, message):
    out = tmp_path / "folder" / "out"
    with pytest.raises(FrugalError) as caught:
        small_training(steps, out, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.status == 2
    assert not list(out.parent.glob("out*"))


def test_a_trained_model_is_not_made_bitnet(plain, tmp_path):
    with pytest.raises(FrugalError, match="a trained model's are lost"):
        small_training(["bitnet"], tmp_path / "x", model=str(plain[0]), from_scratch=False, shape=None)


def test_run_says_that_training_methods_train(plain, tmp_path):
    with pytest.raises(FrugalError, match="frugal train"):
        frugallm.run(str(plain[0]), ["bitnet"], out=tmp_path / "x")


def test_a_loss_that_explodes_ends_the_training_and_keeps_the_work(tmp_path, monkeypatch):
    from frugallm.training.contract import TrainMethod

    plain_loss = TrainMethod.loss
    monkeypatch.setattr(
        TrainMethod,
        "loss",
        lambda self, student, teacher, batch: plain_loss(self, student, teacher, batch) * torch.nan,
    )
    with pytest.raises(JobError, match="the loss is nan at step 1") as caught:
        small_training([], tmp_path / "out")
    assert caught.value.status == 1


def test_what_no_other_format_holds_is_not_exported(tmp_path, capsys):
    out = tmp_path / "bits"
    small_training(["bitnet"], out, evaluate=False, verify=False)
    for kind, name in (("dense", "x"), ("gguf:Q4_0", "x.gguf")):
        assert main(["export", str(out), "--to", kind, "--out", str(tmp_path / name)]) == 2
        assert "no other format holds" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
    assert main(["inspect", str(out)]) == 0
    assert "BitNet, ternary weights" in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["ternary", "binary"])
def test_bitnet_is_stored_in_few_bits_and_verified(tmp_path, weights):
    out = tmp_path / "bits"
    report = small_training([f"bitnet:weights={weights}"], out)
    assert any(note.startswith("verified") for note in report.notes)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == ("bitnet" if weights == "ternary" else "frugallm-bitnet")
    (file,) = out.glob("*.safetensors")
    coded = report.coded_weights * (2 if weights == "ternary" else 1) / 8
    # beside codes: the embedding, gains of norms, scales, all in 16 bits, and the header
    assert coded < file.stat().st_size < coded + 2 * (300 * 32 + 3000) + 8000
    loaded, _ = frugallm.load(out)
    assert loaded.model.layers[0].self_attn.q_proj.weight.unique().numel() == (
        3 if weights == "ternary" else 2
    )


def test_the_command_reaches_the_library(tmp_path, capsys):
    out = tmp_path / "out"
    text = tmp_path / "t.txt"
    text.write_text("the cat sat on the mat. " * 400)
    line = [
        "train",
        "tiny",
        "--from-scratch",
        "--out",
        str(out),
        "--text",
        str(text),
        "--eval-text",
        str(text),
    ]
    line += ["--shape", "vocab_size=280,hidden_size=16,intermediate_size=32,num_hidden_layers=1"]
    line += ["--seq-len", "16", "--max-steps", "2", "--batch", "2", "--windows", "2", "--threads", "1"]
    assert main([*line, "--progress", "json"]) == 0
    seen = capsys.readouterr()
    assert '"event": "step", "index": 2, "of": 2' in seen.err
    assert "| perplexity |" in seen.out
    shutil.rmtree(out)
    assert main([*line, "--shape", "nonsense"]) == 2
    assert "cannot read --shape" in capsys.readouterr().err
    assert main(["train", "tiny", "--from-scratch"]) == 2
    assert main(["train", "tiny", "--out", str(out)]) == 2
    assert "Add --from-scratch" in capsys.readouterr().err
    assert not out.exists()
