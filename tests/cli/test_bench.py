"""``frugal bench`` on a tiny model, and what it holds rates against."""

import json
import sys
import time

import pytest
import torch

from frugallm.cli.bench import table
from frugallm.cli.main import main
from frugallm.engine import speed
from frugallm.engine.llm import LLM
from frugallm.engine.speed import Sizes, Speed, Trial, at_limit, measure, weights_bytes
from frugallm.errors import JobError, ModelError
from frugallm.kernels import limits as limits_of
from frugallm.kernels.decoder import Decoder, DecoderLayer
from frugallm.kernels.limits import limits as measured_limits
from frugallm.kernels.packing import pack_float
from frugallm.models.family import Heads
from small_engine import letters_tokenizer
from tiny_decoders import tiny

SMALL = Sizes(prefill=20, prompt=6, answer=5, streams=3)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Leave out what takes seconds: large products, and processes of their own."""
    monkeypatch.setattr(limits_of, "limits", lambda rounds: {"memory": 2e9, "bf16": 3e9, "int8": 4e9})
    monkeypatch.setattr(speed, "start_seconds", lambda model: 1.5)
    monkeypatch.setattr(speed, "Sizes", lambda: SMALL)


def test_bench_prints_a_table_and_writes_json(folder, tmp_path, capsys):
    file = tmp_path / "speed.json"
    threads = torch.get_num_threads()
    assert main(["bench", str(folder), "--repeats", "2", "--threads", "1", "--json", str(file)]) == 0
    assert torch.get_num_threads() == threads
    shown = capsys.readouterr().out
    found = Speed.model_validate_json(file.read_text())
    assert shown == table(found) + "\n"
    assert "prefill of 20" in shown and "batch of 3 × (6 → 5)" in shown and "1.50 s" in shown
    assert found.threads == 1 and found.path == "reference" and found.limits["memory"] == 2e9
    assert found.decode.share is None and "not known" in shown
    for figure in (found.prefill, found.decode, found.batch):
        assert 0 < figure.rate.low <= figure.rate.value <= figure.rate.high and figure.rate.repeats == 2
    assert json.loads(file.read_text())["peak_bytes"] > 0


def test_what_transformers_computes_is_measured_as_well(tmp_path):
    tiny("gpt2", num_key_value_heads=None, n_positions=64).save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    found = measure(str(tmp_path), repeats=1)
    assert found.path == "transformers" and "through transformers" in table(found)
    assert found.weights_bytes is None and found.cache_bytes is None and found.batch.rate.value > 0


def test_a_short_context_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(speed, "Sizes", lambda: Sizes(prefill=256))
    assert main(["bench", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "hold 256 tokens, the bench takes 257" in error and error.count("\n") == 1
    with pytest.raises(ModelError, match="the bench takes 262"):
        measure(str(folder), Sizes(prefill=1, prompt=200, answer=61))


def test_every_repeat_computes_all_of_its_tokens(folder):
    llm = LLM(folder)
    trial = Trial(llm, SMALL)
    counted = []
    compute = llm.engine._compute
    llm.engine._compute = lambda step: counted.append(sum(count for _, count in step.parts)) or compute(step)
    for _ in range(2):  # nothing is known from the first time
        counted.clear()
        assert trial.prefill() > 0 and sum(counted) == 20
        counted.clear()
        assert trial.decode() > 0 and counted == [6, 1, 1, 1, 1, 1]
        counted.clear()
        assert trial.batch() > 0 and counted == [18, 3, 3, 3, 3]


def test_the_limits_of_a_decoder():
    weight = pack_float(torch.ones(16, 32, dtype=torch.bfloat16))
    norm = torch.ones(32)
    layer = DecoderLayer(weight, weight, weight, weight, norm, norm)
    head = pack_float(torch.ones(64, 32, dtype=torch.bfloat16))
    decoder = Decoder((layer,), head, head, norm, norm, norm, Heads(1, 1, 32), 32, 16, 1e-5)
    read = 2 * 32 * (4 * 16 + 64)
    assert weights_bytes(decoder) == read
    machine = {"memory": 1000.0, "bf16": 500.0, "int8": 1.0}
    best = at_limit(decoder, Sizes(prefill=9, prompt=10, answer=3, streams=2), machine)
    token, step = 2 * 4 * 16 * 32 / 500, 2 * 2 * (4 * 16 + 64) * 32 / 500
    assert best["prefill"] == pytest.approx(1 / token)
    assert best["decode"] == pytest.approx(1000 / read)
    assert step > read / 1000
    assert best["batch"] == pytest.approx(2 * 3 / (2 * 10 * token + 2 * step))


def test_the_start_ends_with_the_first_token(tmp_path, monkeypatch):
    monkeypatch.undo()
    program = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(program))

    def stands_for(script):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    stands_for('sleep 0.1; echo "$4 $OMP_NUM_THREADS" >> "$0.said"; printf x; sleep 0.3')
    begin = time.perf_counter()
    taken = speed.start_seconds("m")
    assert 0.1 <= taken <= time.perf_counter() - begin - 0.3  # the process goes on behind its first token
    assert (tmp_path / "python.said").read_text() == f"m {torch.get_num_threads()}\n"
    stands_for("echo 'error: m is gone' >&2; exit 2")
    with pytest.raises(JobError, match=r"first token failed \(m is gone\)"):
        speed.start_seconds("m")


def test_limits_are_rates():
    assert 0.002 <= limits_of.seconds(lambda: time.sleep(0.002), rounds=1, least=0.0) < 0.02
    found = measured_limits(rounds=1, size=64, read=1 << 16)
    assert list(found) == ["memory", "bf16", "int8"]
    assert all(1e6 < rate < 1e15 for rate in found.values())
