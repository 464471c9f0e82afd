"""The benchmark of the engine, as far as it needs neither models nor peers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("engine_speed", "engine_context", "peer_engine", "harness", "peers", "setting")


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


class Pretended:
    """Takes no time, and notes what it is asked."""

    def __init__(self):
        self.asked = []

    def write(self, prompts, tokens):
        self.asked.append((prompts, tokens))
        return [float(i) for i in range(1, tokens + 1)] if len(prompts) == 1 else [3e9]

    def facts(self):
        return {}


def prompts(first):
    return {"prefill": [[first] * 6] * 3, "decode": [first] * 2, "batch": [[first], [first + 1]]}


def test_a_side_is_asked_on_other_ids_before_it_is_timed():
    import peer_engine

    side = Pretended()
    request = {"warm": prompts(1), "timed": prompts(5), "answer": 4}
    found = peer_engine.work(side, request)
    assert [len(p) for p, _ in side.asked] == [1, 1, 1, 1, 2] * 2
    assert [p[0][0] for p, _ in side.asked] == [1] * 5 + [5] * 5
    assert [tokens for _, tokens in side.asked] == [1, 1, 1, 5, 4] * 2
    assert found["decode"] == 1.0  # four tokens in four of its seconds
    assert list(found) == ["prefill", "decode", "batch"]


def test_shared_prompts_come_after_what_they_share_and_one_that_shares_nothing():
    import peer_engine

    side = Pretended()
    shared = {"alone": [7], "before": [8], "sharing": [9]}
    request = {"warm": prompts(1), "timed": prompts(5), "answer": 4, "shared": shared}
    found = peer_engine.work(side, request)
    assert [p[0][0] for p, _ in side.asked[10:]] == [7, 8, 9]
    assert {"alone_seconds", "shared_seconds"} <= set(found)


def test_an_answer_that_ends_early_is_no_figure():
    import peer_engine

    side = Pretended()
    side.write = lambda prompts, tokens: [1.0, 2.0]
    with pytest.raises(SystemExit, match="2 tokens came, not 5"):
        peer_engine.pace(side, [1], 4)


def test_context_is_held_against_a_straight_line():
    from engine_context import by_context, svg

    lengths = (500, 1000, 4000)
    straight = {str(n): 1 / (0.004 + 1e-6 * n) for n in lengths}
    found = by_context([{"context": straight}, {"context": {n: r / 9 for n, r in straight.items()}}] * 2)
    assert found["context"] == list(lengths)
    one = by_context([{"context": straight}])
    assert one["largest_distance_from_line"] < 1e-9
    assert one["seconds_per_token"]["at_0"] == pytest.approx(0.004)
    bent = by_context([{"context": {str(n): 1 / (0.004 + 1e-9 * n * n) for n in lengths}}])
    assert bent["largest_distance_from_line"] > 0.05
    drawn = svg({"ours": one, "theirs": bent})
    assert drawn.count("<circle") == 6 and "4,000" in drawn and "theirs" in drawn


def figures(decode, kl, **more):
    medians = {"decode": decode, "prefill": 3000.0, "batch": 700.0} | more
    return {key: {"median": value} for key, value in medians.items()} | {"evaluation": {"kl": {"value": kl}}}


def test_verdicts_take_the_fastest_type_of_four_bits_and_what_the_engine_computes():
    import engine_speed as speed

    ours = figures(300.0, 0.01, start=4.0, peak_bytes=9e8, alone_seconds=0.8, shared_seconds=0.1)
    ours |= {"on_engine": {"kl": 0.03, "perplexity_ratio": 1.002}}
    ours |= {"how": {"weights_bytes": 1e8, "cache_bytes": 4e8}}
    arms = {speed.OURS: ours, "llama.cpp Q4_0": figures(160.0, 0.05), "llama.cpp Q4_1": figures(100.0, 0.02)}
    arms["llama.cpp Q8_0"] = figures(999.0, 0.0)
    held = speed.verdicts(arms, {})
    assert held["decode: at least 1.7 times llama.cpp Q4_0"] == {"value": 1.875, "passed": True}
    assert held["KL not above that of llama.cpp Q4_0"]["value"] == 0.03
    assert held["KL not above that of llama.cpp Q4_0"]["passed"]
    assert not any("OpenVINO" in words for words in held)  # not measured
    assert all(verdict["passed"] for verdict in held.values())
    arms["OpenVINO int8"] = {key: {"median": 2500.0} for key in ("prefill", "decode", "batch")}
    arms["llama.cpp Q4_1"]["decode"]["median"] = 170.0  # now the fastest, and closer
    ours["how"]["cache_bytes"], ours["shared_seconds"]["median"] = 1e8, 0.2
    held = speed.verdicts(arms, {speed.OURS: {"largest_distance_from_line": 0.2}})
    missed = {words.partition(":")[0] for words, verdict in held.items() if not verdict["passed"]}
    assert missed == {
        "KL not above that of llama.cpp Q4_1",
        "prefill of 512",
        "8 streams end to end",
        "memory beside weights and cache, at most 450 MB",
        "first token with 1,000 shared tokens",
        "time of a token grows linearly with the context",
    }


def test_a_peer_that_cannot_be_installed_is_one_line_before_any_work(monkeypatch, tmp_path):
    import engine_speed as speed

    def fail(name, place):
        raise subprocess.CalledProcessError(1, ["pip", name])

    monkeypatch.setattr(speed.peers, "peer_python", fail)
    assert speed.environments([speed.OURS, "transformers bf16"], tmp_path) == {}
    with pytest.raises(SystemExit, match="openvino is not installed and cannot be") as refused:
        speed.environments([speed.OURS, "OpenVINO int8"], tmp_path)
    assert "--only 'frugallm W4" in str(refused.value) and "OpenVINO" not in str(refused.value)


def test_arms_run_in_turn_and_back():
    import engine_speed as speed

    order = []
    runs = speed.in_turn(["a", "b"], 3, lambda name: order.append(name) or {"of": name})
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(of) for name, of in runs.items()} == {"a": 3, "b": 3}
    assert json.dumps(runs)
