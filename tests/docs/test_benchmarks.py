"""What the benchmarks share and needs no model."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    yield harness
    sys.modules.pop("harness", None)


def test_a_folder_is_made_again_unless_it_is_there_with_what_it_took(harness, tmp_path):
    out, made = tmp_path / "arm", []

    def make():
        assert not out.exists()
        out.mkdir()
        (out / "config.json").write_text("{}")
        made.append(out)
        return {"seconds": float(len(made))}

    assert [harness.run_once(out, "arm", make, resume=again)["seconds"] for again in (True, True, False)] == [
        1,
        1,
        2,
    ]
    (out / "config.json").unlink()  # broken off
    assert harness.run_once(out, "arm", make, resume=True)["seconds"] == 3


def test_verdicts_are_told_with_what_was_found(harness, tmp_path, capsys):
    harness.show_verdicts({"fast": {"passed": True}, "small": {"passed": False, "value": 2}}, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith("- PASS: fast")
        and lines[1].startswith("- FAIL: small")
        and "'value': 2" in lines[1]
    )
    assert lines[-1] == f"Written to {tmp_path}."


def test_the_longest_pass_of_each_kind_is_held_against_its_limit(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quantization

    def run(seconds):
        return {"compress_seconds": seconds and {"median": seconds}}

    runs = {
        "W3 gptq": run(80.0),
        "W3 gptaq": run(301.0),
        "W3 gptq lkd": run(1100.0),
        "W4A8 zeroquant": run(None),
    }
    found = quantization.slowest(runs)
    words = {name: (one["value"], one["passed"]) for name, one in found.items()}
    assert words == {
        "solvers and transforms: seconds of the longest pass, W3 gptaq": (301.0, False),
        "reconstructions: seconds of the longest pass, W3 gptq lkd": (1100.0, True),
    }
    for name in ("quantization", "arms", "harness", "peers", "setting"):
        sys.modules.pop(name, None)
