"""A run that is killed at any moment goes on to the same bytes, and its folder is complete or absent."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from frugallm.cli.main import main
from frugallm.conformance.block_methods import Killed, KilledAfter
from frugallm.progress import Progress
from small_job import SmallJob, fixed_files, listing, write_model, write_text

COMPOSED = ("smoothquant", "gptq:bits=4", "embedding:bits=8")
PLAIN = ("gptq",)
#: Seconds after which a process that should have ended is taken for one that hangs.
PATIENCE = 120
#: Kills that have to hit.
ENOUGH = 20


class Recorded(Progress):
    """Remembers when each event came."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def event(self, kind: str, **facts: Any) -> None:
        self.times.append(time.monotonic())


class Sent(Progress):
    """Sends a byte for every event to whoever waits to kill."""

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self.connection = connection

    def event(self, kind: str, **facts: Any) -> None:
        self.connection.send_bytes(b".")


@dataclass
class Whole:
    """An unbroken run: what must come out, and the seconds from each event to the next."""

    job: SmallJob
    files: dict[str, bytes]
    names: set[str]
    gaps: list[float]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("resume")
    write_model(place / "model")
    write_text(place / "text.txt")
    return place


@pytest.fixture(scope="module", params=[COMPOSED, PLAIN], ids=["composed", "gptq"])
def whole(request, place) -> Whole:
    job = SmallJob(place / "model", place / "text.txt", request.param, place / f"whole-{len(request.param)}")
    job.run()
    files, names = fixed_files(job.out), {p.name for p in job.out.iterdir()}
    recorded = Recorded()  # of a second run, for the first one also imports
    job.run(progress=recorded, overwrite=True)
    assert fixed_files(job.out) == files
    return Whole(job, files, names, [after - before for before, after in pairwise(recorded.times)])


@pytest.fixture
def job(place, tmp_path) -> SmallJob:
    """A job whose inputs may be changed."""
    model = Path(shutil.copytree(place / "model", tmp_path / "model"))
    text = Path(shutil.copy(place / "text.txt", tmp_path / "text.txt"))
    return SmallJob(model, text, COMPOSED, tmp_path / "out")


def partial(job: SmallJob) -> Path:
    return job.out.with_name(job.out.name + ".partial")


def interrupt(job: SmallJob, **options: Any) -> None:
    """Leave the job unfinished after its first block."""
    with pytest.raises(Killed):
        job.run(progress=KilledAfter(1), **options)


# -- killed ------------------------------------------------------------------------------------------------------------


def killed(job: SmallJob, event: int, delay: float) -> bool:
    """Resume the job in a process of its own, kill it after an event and a delay; False if it was done before."""
    context = multiprocessing.get_context("fork")  # everything is imported already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=job.run, kwargs={"resume": True, "progress": Sent(sender)})
    process.start()
    sender.close()
    try:
        for _ in range(event):
            receiver.recv_bytes()
    except EOFError:
        pass
    time.sleep(delay)
    process.kill()
    process.join(PATIENCE)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def where(job: SmallJob) -> str:
    """Say how far a killed job had come."""
    if job.out.exists():
        return "named"
    if not (partial(job) / "job.json").exists():
        return "reading"
    if (partial(job) / "final.safetensors").exists():
        return "saving"
    return "walking" if (partial(job) / "block-00000.safetensors").exists() else "first block"


def check_absent_or_complete(job: SmallJob, whole: Whole) -> None:
    if job.out.exists():
        assert {p.name for p in job.out.iterdir()} == whole.names
        assert fixed_files(job.out) == whole.files


def moments(whole: Whole, rng: random.Random) -> Iterator[tuple[int, float]]:
    """Yield events and delays: between any two events, seven more while saving, then at any time from the start."""
    gaps = list(enumerate(whole.gaps, 1))
    chosen = gaps + [gaps[-1]] * 7
    rng.shuffle(chosen)
    for event, gap in chosen:
        yield event, rng.uniform(0, gap)
    for _ in range(40):
        yield 0, rng.uniform(0, sum(whole.gaps))


def test_killed_at_any_moment_it_ends_in_the_same_bytes(whole, tmp_path):
    rng = random.Random(len(whole.job.steps))
    seen: Counter[str] = Counter()
    for number, moment in enumerate(moments(whole, rng)):
        if seen.total() >= ENOUGH and number >= len(whole.gaps) + 10:
            break
        job = replace(whole.job, out=tmp_path / f"out-{number}")
        again = (0, rng.uniform(0, sum(whole.gaps)))  # some are killed again when they go on
        for when in (moment, again) if number % 3 == 0 else (moment,):
            if killed(job, *when):
                seen[where(job)] += 1
            check_absent_or_complete(job, whole)
        job.run(resume=True)
        assert job.out.exists() and not partial(job).exists()
        check_absent_or_complete(job, whole)
    assert seen.total() >= ENOUGH, seen
    assert min(seen["walking"], seen["saving"], seen["first block"] + seen["reading"]) >= 2, seen


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("frugal")), *arguments]


def environment() -> dict[str, str]:
    folder = str(Path(sys.executable).parent)
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": os.pathsep.join([folder, os.environ["PATH"]])}


def after_a_block(line: list[str], send: signal.Signals) -> tuple[int, str]:
    """Run a command, send it a signal after the first block, and return its status and what it wrote then."""
    process = subprocess.Popen(
        line,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(),
        # whoever started the tests in the background has SIGINT ignored, which would be passed on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    with process:
        for shown in process.stderr:
            if shown.startswith('{"event": "block"'):
                break
        else:
            raise AssertionError(f"ended before its first block, with {process.wait(PATIENCE)}: {shown}")
        process.send_signal(send)
        rest = process.stderr.read()
        return process.wait(PATIENCE), rest


def test_the_command_interrupted_and_killed_goes_on_as_it_says(place, tmp_path):
    job = SmallJob(place / "model", place / "text.txt", PLAIN, tmp_path / "the out")
    line = command(*job.command("--no-evaluate", "--progress", "json"))

    status, shown = after_a_block(line, signal.SIGINT)
    assert status == 130, shown
    assert "Traceback" not in shown and not job.out.exists()
    assert (partial(job) / "block-00000.safetensors").exists()
    [said] = [text for text in shown.splitlines() if text.startswith("interrupted")]
    resume = said.removeprefix("interrupted; continue with: ")
    assert resume.startswith("frugal run ") and resume.endswith(" --resume")

    status, _ = after_a_block([*line, "--resume"], signal.SIGKILL)
    assert status == -signal.SIGKILL and not job.out.exists()

    done = subprocess.run(resume, shell=True, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    events = [json.loads(text) for text in done.stderr.splitlines() if text.startswith("{")]
    assert 0 < sum(e["event"] == "block" for e in events) < 4  # it went on and did not begin again
    assert events[-1]["event"] == "done"
    unbroken = replace(job, out=tmp_path / "whole")
    unbroken.run()
    assert fixed_files(job.out) == fixed_files(unbroken.out)


# -- what is refused, and what is not ----------------------------------------------------------------------------------


def change_model(job: SmallJob) -> SmallJob:
    weights = job.model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # the last bit of a mantissa
    weights.write_bytes(content)
    return job


def change_text(job: SmallJob) -> SmallJob:
    write_text(job.text, seed=1)
    return job


CHANGES = {
    "recipe": (lambda job: replace(job, steps=("gptq:bits=3",)), [], "recipe"),
    "parameter": (
        lambda job: replace(job, steps=("smoothquant", "gptq:bits=3", "embedding:bits=8")),
        [],
        "recipe 2.gptq.bits was 4, is 3",
    ),
    "model": (change_model, [], "model.digest was"),
    "text": (change_text, [], "text.digest was"),
    "seed": (lambda job: job, ["--seed", "1"], "seed was 0, is 1"),
    "samples": (lambda job: job, ["--samples", "23"], "tokens.samples was 24, is 23"),
    "dtype": (lambda job: job, ["--dtype", "fp32"], 'dtype was "bfloat16", is "float32"'),
}


@pytest.mark.parametrize("state", ["unfinished", "finished"])
@pytest.mark.parametrize("change", CHANGES)
def test_another_job_is_not_resumed(change, state, job, capsys):
    if state == "finished":
        job.run()
    else:
        interrupt(job)
    kept = job.out if state == "finished" else partial(job)
    before = listing(kept)
    make, more, says = CHANGES[change]
    assert main(make(job).command("--quiet", "--resume", *more)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {kept} belongs to another job: ") and shown.count("\n") == 1
    assert says in shown and "--overwrite" in shown
    assert listing(kept) == before


def test_resume_with_nothing_started_starts_and_with_all_done_says_so(job, capsys):
    assert main(job.command("--no-evaluate", "--progress", "none", "--resume")) == 0
    before = listing(job.out)
    capsys.readouterr()
    assert main(job.command("--no-evaluate", "--resume")) == 0
    shown = capsys.readouterr()
    assert f"{job.out} is finished already" in shown.err
    assert "gptq" in shown.out  # the table again
    assert listing(job.out) == before
    assert main(job.command("--no-evaluate", "--resume", "--progress", "json")) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {"event": "note", "text": f"{job.out} is finished already"} in events
    assert events[-1]["event"] == "done"


def test_killed_after_the_folder_got_its_name_only_the_rest_is_cleared(job):
    job.run()
    partial(job).mkdir()
    (partial(job) / "block-00000.safetensors").write_bytes(b"left")
    before = listing(job.out)
    job.run(resume=True)
    assert listing(job.out) == before and not partial(job).exists()


def test_without_resume_what_is_there_is_refused(job, capsys):
    interrupt(job)
    before = listing(partial(job))
    assert main(job.command("--quiet")) == 2
    assert "holds an unfinished run. Go on with --resume" in capsys.readouterr().err
    assert listing(partial(job)) == before
    job.run(resume=True)
    before = listing(job.out)
    assert main(job.command("--quiet")) == 2
    assert f"{job.out} exists. Choose another --out, or --overwrite it" in capsys.readouterr().err
    assert listing(job.out) == before


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_overwrite_starts_anew(state, job):
    if state == "finished":
        job.run(seed=1)
        (job.out / "stale").touch()
    else:
        interrupt(job, seed=1)
    job.run(overwrite=True)
    fresh = replace(job, out=job.out.with_name("fresh"))
    fresh.run()
    assert fixed_files(job.out) == fixed_files(fresh.out)
    assert not partial(job).exists()


def test_overwrite_spares_what_no_run_wrote(job, capsys):
    job.out.mkdir()
    (job.out / "thesis.tex").write_text("years of work")
    assert main(job.command("--quiet", "--overwrite")) == 2
    assert "is no result of a run and is not overwritten" in capsys.readouterr().err
    assert (job.out / "thesis.tex").read_text() == "years of work"
    assert not partial(job).exists()


def test_a_removal_that_was_broken_off_leaves_nothing_that_counts(job):
    interrupt(job, seed=1)  # another job, whose removal by --overwrite was killed after its first step
    (partial(job) / "job.json").unlink()
    job.run(resume=True)
    fresh = replace(job, out=job.out.with_name("fresh"))
    fresh.run()
    assert fixed_files(job.out) == fixed_files(fresh.out)


def test_a_removal_takes_the_state_first(job, monkeypatch):
    interrupt(job)

    def broken_off(path: Path) -> None:
        assert path == partial(job) and not (path / "job.json").exists()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", broken_off)
    with pytest.raises(Killed):
        job.run(overwrite=True)
