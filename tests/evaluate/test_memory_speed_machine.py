"""Measuring instruments read what they say."""

import ctypes
import json
import time

import psutil
import pytest
import torch

from frugallm.evaluate import memory
from frugallm.evaluate.machine import machine, versions
from frugallm.evaluate.memory import AnonymousPeak, _group_room, anonymous_bytes, give_back
from frugallm.evaluate.precision import processor_flags
from frugallm.evaluate.speed import Rate
from frugallm.formats.outside import measure_speed

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
    with torch.inference_mode():
        speed = measure_speed(model, torch.zeros(1, 24, dtype=torch.int64), 5, 2)
    elapsed = time.perf_counter() - start
    assert fed == [24, 1, 1, 1, 1, 1] * 2
    assert sum(24 / rate for rate in speed["prefill"]) + sum(5 / rate for rate in speed["decode"]) < elapsed
    rate = Rate.of([3.0, 1.0, 2.0])
    assert (rate.low, rate.value, rate.high, rate.repeats, rate.unit) == (1.0, 2.0, 3.0, 3, "tokens/s")


def test_machine_facts_are_plain_data():
    facts = machine()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["memory_bytes"] > 100 * MB
    assert facts["threads"] == torch.get_num_threads() and set(facts["flags"]) <= processor_flags()
    assert json.loads(json.dumps(facts)) == facts
    assert versions()["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("membership", "folder", "limit", "stat", "room"),
    [
        (
            "3:cpuset:/\n4:memory:/a/b\n0::/\n",
            "memory/a/b",
            ("memory.limit_in_bytes", "4000"),
            "total_rss 1500",
            2500,
        ),
        ("4:memory:/on/the/host\n", "memory", ("memory.limit_in_bytes", "4000"), "total_rss 500", 3500),
        ("4:memory:/\n", "memory", ("memory.limit_in_bytes", "9223372036854771712"), "total_rss 500", None),
        ("0::/user\n", "user", ("memory.max", "9000"), "anon 1000\nfile 7000", 8000),
        ("0::/user\n", "user", ("memory.max", "max"), "anon 1000\nfile 7000", None),
        ("0::/\n", ".", ("cgroup.procs", "1"), "", None),
    ],
)
def test_a_control_group_limits_what_is_available(tmp_path, membership, folder, limit, stat, room):
    own, group = tmp_path / "cgroup", tmp_path / "fs" / folder
    own.write_text(membership)
    group.mkdir(parents=True)
    (group / limit[0]).write_text(limit[1] + "\n")
    if stat:
        (group / "memory.stat").write_text(stat + "\n")
    assert _group_room(own, tmp_path / "fs") == room


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps freed memory like this"
)
def test_freed_memory_goes_back_to_the_system():
    before = anonymous_bytes()
    pieces = [bytearray(10_000) for _ in range(20_000)]  # too small to be mapped one by one
    last = bytearray(10_000)  # what lies above them in the heap keeps them there
    del pieces
    give_back()
    assert anonymous_bytes() - before < 100_000_000
    assert len(last) == 10_000
