import signal
import sys
from types import SimpleNamespace

import pytest

from frugallm.cli.main import main
from frugallm.cli.run import interruptible


@pytest.fixture
def job(monkeypatch):
    """Stands in for the library's run: remembers how it was called and does what ``outcome`` says."""
    seen = SimpleNamespace(model=None, recipe=None, options=None, outcome=None)

    def run(model, recipe, **options):
        seen.model, seen.recipe, seen.options = model, recipe, options
        options["progress"].event("block", index=3, of=30)
        if seen.outcome is not None:
            raise seen.outcome
        return SimpleNamespace(to_markdown=lambda: "| the | table |")

    monkeypatch.setitem(sys.modules, "frugallm.compression", SimpleNamespace(run=run))
    return seen


def test_every_option_reaches_the_library(job, capsys):
    line = (
        "run m rtn:bits=3 embedding --out d --resume --overwrite --text t --samples 4 --seq-len 64 --seed 7"
    )
    line += " --eval-text e --windows 2 --no-evaluate --shares --dtype fp16 --device cuda --threads 2 --progress none"
    assert main(line.split()) == 0
    assert job.model == "m"
    assert job.recipe.to_cli() == ["rtn:bits=3", "embedding"]
    given = {key: str(value) for key, value in job.options.items() if key != "progress"}
    expected = {
        "out": "d",
        "resume": "True",
        "overwrite": "True",
        "text": "t",
        "samples": "4",
        "seq_len": "64",
    }
    expected |= {
        "seed": "7",
        "eval_text": "e",
        "windows": "2",
        "evaluate": "False",
        "shares": "True",
        "dtype": "fp16",
    }
    assert given == expected | {"device": "cuda", "threads": "2"}
    assert "the | table" in capsys.readouterr().out


def test_progress_goes_to_standard_error_as_json(job, capsys):
    assert main(["run", "m", "rtn", "--out", "d", "--progress", "json"]) == 0
    assert capsys.readouterr().err == '{"event": "block", "index": 3, "of": 30}\n'


def test_quiet_prints_nothing(job, capsys):
    assert main(["run", "m", "rtn", "--out", "d", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_run_says_how_to_go_on(job, capsys, monkeypatch):
    job.outcome = KeyboardInterrupt()
    line = ["run", "m", "rtn", "--out", "my dir"]
    monkeypatch.setattr(sys, "argv", ["frugal", *line])
    assert main() == 130
    assert "continue with: frugal run m rtn --out 'my dir' --resume" in capsys.readouterr().err


@pytest.mark.parametrize("pressed", [True, False])
def test_an_interruption_that_a_library_turned_into_an_error_is_still_one(pressed):
    def library() -> None:
        try:
            if pressed:
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        raise SystemError("returned a result with an exception set")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt if pressed else SystemError), interruptible():
        library()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_disk_is_a_failure_not_bad_input(job, capsys):
    job.outcome = OSError(28, "No space left on device", "d.partial/x")
    assert main(["run", "m", "rtn", "--out", "d", "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("error: No space left on device: d.partial/x. Free some space")
