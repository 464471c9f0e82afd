"""Measuring instruments read what they say."""

import json
import time

import psutil
import pytest
import torch

from frugallm.errors import ParameterError
from frugallm.evaluate import memory
from frugallm.evaluate.machine import machine, versions
from frugallm.evaluate.memory import AnonymousPeak, anonymous_bytes
from frugallm.evaluate.precision import processor_flags
from frugallm.evaluate.speed import measure_speed

MB = 1_000_000


def test_peak_sees_memory_that_is_gone_at_the_end():
    with AnonymousPeak(every=0.005) as peak:
        block = torch.ones(60 * MB // 4)
        time.sleep(0.1)
        del block
    assert 50 * MB < peak.peak - peak.baseline < 120 * MB
    assert anonymous_bytes() < peak.peak - 40 * MB


def test_mapped_files_are_not_counted(tmp_path):
    path = tmp_path / "mapped"
    path.write_bytes(bytes(60 * MB))
    with AnonymousPeak(every=0.005) as peak:
        mapped = torch.from_file(str(path), shared=True, size=60 * MB, dtype=torch.uint8)
        assert int(mapped.max()) == 0
        time.sleep(0.05)
    assert peak.peak - peak.baseline < 30 * MB


def test_without_proc_psutil_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "absent")
    assert anonymous_bytes() == pytest.approx(psutil.Process().memory_full_info().uss, rel=0.05)


def test_speed_counts_the_tokens_it_was_told_to(model):
    fed = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].shape[1]))
    start = time.perf_counter()
    speed = measure_speed(model, prompt_tokens=24, new_tokens=5, repeats=2)
    elapsed = time.perf_counter() - start
    assert fed == [24, 1, 1, 1, 1, 1] * 3
    for rate in (speed.prefill, speed.decode):
        assert 0 < rate.low <= rate.value <= rate.high and rate.repeats == 2 and rate.unit == "tokens/s"
    assert 2 * 24 / speed.prefill.value < elapsed * 2 and speed.dtype == "float32"
    with pytest.raises(ParameterError, match="at least 1"):
        measure_speed(model, new_tokens=0)


def test_machine_facts_are_plain_data():
    facts = machine()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["memory_bytes"] > 100 * MB
    assert facts["threads"] == torch.get_num_threads() and set(facts["flags"]) <= processor_flags()
    assert json.loads(json.dumps(facts)) == facts
    assert versions()["torch"] == torch.__version__
