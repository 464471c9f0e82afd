"""What a step gives is what the run without it loses, measured as that run by itself would be."""

import json
from types import SimpleNamespace

import pytest

from frugallm import measure
from frugallm.compression import run
from frugallm.errors import ParameterError
from frugallm.evaluate.bootstrap import interval
from frugallm.evaluate.report import Report
from frugallm.progress import Progress

STEPS = ("os_plus", "gptq", "lorc")
WITHOUT = (("inputs:scale=static", "gptq", "lorc"), ("os_plus", "rtn", "lorc"), ("os_plus", "gptq"))
CHEAP = ("rtn:search=mse", "embedding")


class Heard(Progress):
    """Keeps events, and breaks off at the stage that begins with some words."""

    def __init__(self, last=None):
        super().__init__()
        self.events, self.last = [], last

    def event(self, kind, **facts):
        self.events.append((kind, facts))
        if self.last and facts.get("text", "").startswith(self.last):
            raise KeyboardInterrupt


@pytest.fixture(scope="module", autouse=True)
def no_speed():
    """Speed is measured in other processes, and is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_original_outside", lambda *_: {})
        patch.setattr(measure, "_ask", lambda *_, **__: SimpleNamespace(facts={}))
        yield


@pytest.fixture(scope="module")
def compress(trained_folder):
    """Run a recipe on the tiny trained model."""

    def compress(steps, out, **options):
        fixed = {"samples": 16, "seq_len": 64, "windows": 4, "seed": 5, "threads": 1, "verify": False}
        return run(str(trained_folder), list(steps), out=out, **(fixed | options))

    return compress


@pytest.fixture(scope="module")
def composed(compress, tmp_path_factory):
    """A finished run with shares, its events and its folder."""
    out, heard = tmp_path_factory.mktemp("shares") / "out", Heard()
    return SimpleNamespace(report=compress(STEPS, out, shares=True, progress=heard), heard=heard, out=out)


def test_each_step_of_a_recipe_that_no_paper_published_has_its_share(composed):
    shares = composed.report.shares
    assert [share.step for share in shares] == list(STEPS)
    assert [share.instead for share in shares] == [["inputs:scale=static"], ["rtn"], []]
    whole = composed.report.models[1]
    for share in shares:
        assert share.share.value == pytest.approx(share.kl.value - whole.quality.kl.value, abs=1e-12)
        assert share.share.low <= share.share.value <= share.share.high and share.reason == ""
    assert shares[2].whole_bits < whole.whole_bits  # two thin matrices are not stored
    assert [s.whole_bits for s in shares[:2]] == pytest.approx([whole.whole_bits] * 2, rel=0.01)
    stored = Report.from_json((composed.out / "measurements.json").read_text())
    assert stored.shares == shares


def test_the_question_stands_above_an_answer_that_only_the_original_gave(compress, tmp_path, monkeypatch):
    from frugallm import measure

    speed = {"prefill": [9.0, 10.0], "decode": [8.0, 9.0]}
    seen = {"speed": speed, "default.anonymous_bytes": 10**6, "answer": "Paris."}
    monkeypatch.setattr(measure, "_original_outside", lambda *_: seen)
    report = compress(["gptq", "lorc"], tmp_path / "out")  # plain transformers does not load it
    assert [model.answer for model in report.models] == ["Paris.", ""]
    assert report.prompt and f"> {report.prompt}" in report.to_markdown()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_figures_are_those_of_a_run_without_the_step(index, composed, compress, tmp_path):
    alone = compress(WITHOUT[index], tmp_path / "out").models[1]
    share = composed.report.shares[index]
    assert share.kl.value == pytest.approx(alone.quality.kl.value, rel=1e-9)
    assert share.perplexity.value == pytest.approx(alone.quality.perplexity.value, rel=1e-9)
    assert share.whole_bits == pytest.approx(
        alone.whole_bits, rel=1e-3
    )  # the header of a file counts as well
    pairs = zip(alone.quality.kl_per_window, composed.report.models[1].quality.kl_per_window, strict=True)
    assert (share.share.low, share.share.high) == pytest.approx(interval([a - b for a, b in pairs], 5))


def test_events_say_which_step_is_left_out_and_blocks_are_not_those_of_the_job(composed):
    stages = [facts["text"] for kind, facts in composed.heard.events if kind == "stage"]
    assert [text for text in stages if "leaving out" in text] == [
        f"leaving out {step} (step {number} of 3)" for number, step in enumerate(STEPS, 1)
    ]
    counts = [sum(kind == k for kind, _ in composed.heard.events) for k in ("block", "compared block")]
    assert counts[1] == 3 * counts[0] > 0


def test_nothing_is_measured_without_being_asked_and_the_bytes_are_the_same(composed, compress, tmp_path):
    report = compress(STEPS, tmp_path / "out")
    assert report.shares == [] and "What each step gives" not in report.to_markdown()
    for name in ("model.safetensors", "frugallm.safetensors", "config.json", "manifest.json"):
        files = [place / name for place in (composed.out, tmp_path / "out")]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()


def test_a_run_that_was_broken_off_between_steps_goes_on(compress, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(CHEAP, out, shares=True, progress=Heard("leaving out embedding"))
    assert not out.exists()
    left = tmp_path / "out.partial" / "shares" / "of-a-killed-process"
    left.mkdir(parents=True)
    heard = Heard()
    report = compress(CHEAP, out, shares=True, resume=True, progress=heard)
    assert [share.step for share in report.shares] == list(CHEAP)
    assert not any(kind == "block" for kind, _ in heard.events)  # nothing was compressed again
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    rounding, table = report.shares
    assert rounding.instead == ["rtn"] and table.instead == []
    assert table.share.value < 0  # 8 bits lose something against 16
    assert table.whole_bits > report.models[1].whole_bits


def test_a_step_that_cannot_be_left_out_is_listed_with_the_reason(compress, tmp_path):
    [share] = compress(["rtn"], tmp_path / "out", shares=True).shares
    assert share.kl is share.share is share.perplexity is share.whole_bits is None
    assert share.reason == "rtn is itself the plain form that would take its place"
    heard = Heard()
    compress(["rtn"], tmp_path / "out", shares=True, resume=True, progress=heard)
    assert heard.events[-2][1]["text"].endswith("out is finished already")
    compress(["rtn"], tmp_path / "plain")
    compress(["rtn"], tmp_path / "plain", shares=True, resume=True, progress=heard)
    assert "without the steps' shares: --overwrite" in heard.events[-2][1]["text"]
    assert json.loads((tmp_path / "plain" / "measurements.json").read_text())["shares"] == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"evaluate": False}, "nothing is to be evaluated"),
        ({"windows": 1}, "at least two evaluation windows"),
    ],
)
def test_shares_without_what_they_need_are_refused_before_any_work(options, says, compress, tmp_path):
    with pytest.raises(ParameterError, match=says) as caught:
        compress(["rtn"], tmp_path / "out", shares=True, **options)
    assert caught.value.status == 2 and not any(tmp_path.iterdir())
