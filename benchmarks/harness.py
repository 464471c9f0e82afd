"""What every benchmark shares: measuring a process from outside, facts about the machine, writing results."""

from __future__ import annotations

import datetime
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "results"
GIB = 1024**3
POLL_SECONDS = 0.02
# Children appear seldom; looking for them costs a walk over /proc, so it is done less often than sampling.
FAMILY_SECONDS = 0.25


@dataclass
class Stage:
    """One stage of a measured process: from the event that opened it to the next one."""

    name: str
    start_seconds: float
    seconds: float = 0.0
    peak_anonymous_bytes: int = 0


@dataclass
class Measurement:
    """What one process (with its children) took, seen from outside.

    ``peak_anonymous_bytes`` is the largest sum of ``RssAnon`` over the process tree at one moment: memory
    that the process itself asked for. ``peak_resident_bytes`` also counts mapped files, which the system
    may drop at will. ``processor_seconds`` is the time of all threads together.
    """

    command: list[str]
    status: int
    seconds: float
    processor_seconds: float
    peak_anonymous_bytes: int
    peak_resident_bytes: int
    peak_main_anonymous_bytes: int
    stages: list[Stage] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""

    def stage_seconds(self, *names: str) -> float:
        """Return the seconds spent in the stages of these names; it is an error if none came."""
        spent = [stage.seconds for stage in self.stages if stage.name in names]
        if not spent:
            raise KeyError(f"no stage '{names}' among {[stage.name for stage in self.stages]}")
        return sum(spent)

    def stage_peak(self, *names: str) -> int:
        """Return the peak of anonymous memory of the process tree within these stages, in bytes."""
        return max(stage.peak_anonymous_bytes for stage in self.stages if stage.name in names)


def resident(pid: int) -> tuple[int, int]:
    """Return anonymous and total resident bytes of a process; (0, 0) once it has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    sizes = {"RssAnon": 0, "VmRSS": 0}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        if key in sizes:
            sizes[key] = int(rest.split()[0]) * 1024
    return sizes["RssAnon"], sizes["VmRSS"]


def descendants(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


class _EventReader(threading.Thread):
    """Reads the child's standard error line by line; keeps JSON events with their time, the rest as a log."""

    def __init__(self, stream: Any, began: float, log: Path | None) -> None:
        super().__init__(daemon=True)
        self.stream, self.began, self.log = stream, began, log
        self.events: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.stage = Stage("start", 0.0)
        self.stages = [self.stage]

    def run(self) -> None:
        for line in self.stream:
            event = self._event(line)
            if event is None:
                self.lines.append(line)
                if self.log is not None:
                    with self.log.open("a") as file:
                        file.write(line)
                continue
            now = time.perf_counter() - self.began
            self.events.append({"seconds": round(now, 3), **event})
            if event["event"] == "stage" and event["text"] != self.stage.name:
                self.close(now)
                self.stage = Stage(str(event["text"]), now)
                self.stages.append(self.stage)

    @staticmethod
    def _event(line: str) -> dict[str, Any] | None:
        if not line.startswith("{"):
            return None
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            return None
        return event if isinstance(event, dict) and "event" in event else None

    def close(self, now: float) -> None:
        self.stage.seconds = now - self.stage.start_seconds


def measure(
    command: Sequence[str | Path],
    *,
    threads: int = 2,
    environment: Mapping[str, str] | None = None,
    memory_limit: int | None = None,
    log: Path | None = None,
    check: bool = True,
) -> Measurement:
    """Run ``command``, follow its ``{"event": "stage", ...}`` lines on standard error, and sample its memory.

    Parameters
    ----------
    threads
        Computing threads, handed on as ``OMP_NUM_THREADS`` and ``MKL_NUM_THREADS``.
    memory_limit
        Bytes that the process and its children may hold together, enforced by a memory control group: what the
        system cannot reclaim within it (dropping mapped files) ends in a kill.
    log
        File to which everything on standard error that is no event is added as it comes.
    check
        Raise when the exit status is not 0.
    """
    arguments = [str(part) for part in command]
    count = str(threads)
    env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, **(environment or {})}
    group = _memory_group(memory_limit) if memory_limit else None
    before = _children_seconds()
    began = time.perf_counter()
    process = subprocess.Popen(
        arguments,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: _enter(group)) if group else None,
    )
    reader = _EventReader(process.stderr, began, log)
    reader.start()
    peaks = _sample(process, reader)
    seconds = time.perf_counter() - began
    processor = _children_seconds() - before
    reader.join(timeout=10)
    reader.close(seconds)
    if group:
        group.rmdir()
    said = "".join(reader.lines[-200:])
    if check and process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {' '.join(arguments)}\n{said[-4000:]}")
    return Measurement(
        arguments, process.returncode, seconds, processor, *peaks, reader.stages, reader.events, said
    )


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _memory_group(limit: int) -> Path:
    """Make a control group of ``limit`` bytes, of version 2 or 1 as the system has it."""
    root = Path("/sys/fs/cgroup")
    version_1 = (root / "memory").is_dir()
    group = (root / "memory" if version_1 else root) / f"frugallm-{os.getpid()}"
    try:
        group.mkdir(exist_ok=True)
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit))
    except OSError as error:
        raise SystemExit(f"no memory control group can be made here ({error}); run as root") from error
    return group


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _sample(process: subprocess.Popen[str], reader: _EventReader) -> tuple[int, int, int]:
    anonymous_peak = resident_peak = main_peak = 0
    children: list[int] = []
    looked = 0.0
    while process.poll() is None:
        now = time.perf_counter()
        if now - looked > FAMILY_SECONDS:
            children, looked = descendants(process.pid), now
        sizes = [resident(pid) for pid in (process.pid, *children)]
        anonymous = sum(size[0] for size in sizes)
        anonymous_peak = max(anonymous_peak, anonymous)
        resident_peak = max(resident_peak, sum(size[1] for size in sizes))
        main_peak = max(main_peak, sizes[0][0])
        reader.stage.peak_anonymous_bytes = max(reader.stage.peak_anonymous_bytes, anonymous)
        time.sleep(POLL_SECONDS)
    return anonymous_peak, resident_peak, main_peak


def run_once(out: Path, name: str, make: Callable[[], dict[str, Any]], *, resume: bool) -> dict[str, Any]:
    """Return what making the folder ``out`` took, in which ``seconds`` is one fact; it is kept beside the folder.

    With ``resume``, a folder that is there with what it took is not made again.
    """
    record = out.with_suffix(".run.json")
    if resume and record.is_file() and (out / "config.json").is_file():
        return json.loads(record.read_text())
    shutil.rmtree(out, ignore_errors=True)
    found = make()
    record.write_text(json.dumps(found))
    print(f"{name}: {found['seconds']:.0f} s", flush=True)
    return found


def frugal(*arguments: str | Path) -> list[str]:
    """Return the command line of ``frugal`` of the environment that runs the benchmark."""
    return [str(Path(sys.executable).with_name("frugal")), *(str(part) for part in arguments)]


def run_step(model: Path, step: str, out: Path, options: Sequence[str], threads: int) -> dict[str, Any]:
    """Compress ``model`` with one step in a process of its own; return what that took."""
    run = measure(frugal("run", model, step, "--out", out, *options), threads=threads)
    return {
        "seconds": run.seconds,
        "peak_anonymous_bytes": run.peak_anonymous_bytes,
        "weights_bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
    }


def spread(values: Sequence[float], unit: str) -> dict[str, Any]:
    """Return the median of repeated measurements with the single values beside it."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
        "unit": unit,
    }


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()


def _public(argument: str) -> str:
    """Return a command-line argument without the folders of this machine."""
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def facts() -> dict[str, Any]:
    """Return everything about the machine, the code and the versions that a number depends on."""
    from frugallm.evaluate.machine import machine, versions

    about = machine()
    del about["threads"]  # those of the measured processes are part of the setting
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_public, sys.argv[1:])]),
        "commit": _git("rev-parse", "HEAD"),
        "clean": not _git("status", "--porcelain", "--untracked-files=no"),
        "versions": versions(),
        "machine": about,
    }


def write_result(name: str, content: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``results/NAME.json``; a result of a tree with local changes goes to ``results/unclean/``."""
    target = folder if content["facts"]["clean"] else folder / "unclean"
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def show_verdicts(verdicts: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Print which targets are met, and where the result lies."""
    for text, verdict in verdicts.items():
        print(f"- {'PASS' if verdict['passed'] else 'FAIL'}: {text} ({verdict})")
    print(f"\nWritten to {path}.")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
