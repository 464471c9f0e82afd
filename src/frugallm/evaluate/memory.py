"""Anonymous memory of this process: what it allocated itself, without files mapped into it.

Weights read through a memory map come and go with the page cache; what must fit into memory is the anonymous
part.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from frugallm.errors import JobError

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def status_bytes(field: str) -> int | None:
    """Return a field of this process's status in bytes; ``None`` where the system has no such page."""
    if _STATUS.exists():
        for line in _STATUS.read_text("ascii", "replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process in bytes.

    ``RssAnon`` on Linux; elsewhere the memory unique to the process, as ``psutil`` finds it.
    """
    known = status_bytes("RssAnon")
    if known is not None:
        return known
    import psutil

    return int(psutil.Process().memory_full_info().uss)


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc): else it grows with every block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def extra_bytes(work: Callable[[], Any]) -> int:
    """Return the most resident memory that a call takes beside what is there before, its result included, in bytes.

    The system keeps the peak itself, so nothing is missed however short it is. A first call takes what is taken once.

    Raises
    ------
    JobError
        Where the system keeps no peak that can be set back (anything but Linux).
    """
    work()
    give_back()
    try:
        _RESET.write_text("5")  # sets the peak back to what is resident now
    except OSError as error:
        raise JobError(f"memory cannot be measured here ({error})", "It takes Linux's /proc") from error
    before = status_bytes("VmHWM") or 0
    result = work()
    peak = status_bytes("VmHWM") or 0
    del result
    return peak - before


def available_bytes() -> int:
    """Return how much memory this process may still take, limits set on it or on its control group included."""
    import psutil

    room = int(psutil.virtual_memory().available)
    in_group = _group_room(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    if in_group is not None:
        room = min(room, in_group)
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return room
    # Both limits count what is mapped, touched or not.
    for kind, counted in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            room = min(room, soft - (status_bytes(counted) or 0))
    return room


def _group_room(membership: Path, root: Path) -> int | None:
    """Return what the memory control group (a container's, say) still allows in bytes; ``None`` without a limit.

    What the group holds of files does not count: the system drops it when memory is wanted.
    """
    if not membership.exists():
        return None
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            place, limit, held = root / "memory", "memory.limit_in_bytes", "total_rss"
        elif not controllers:
            place, limit, held = root, "memory.max", "anon"
        else:
            continue
        # Inside a container the path is that of the host, and the container's own group lies at the root.
        for group in (place / path.lstrip("/"), place):
            if (group / limit).exists() and (group / "memory.stat").exists():
                allowed = (group / limit).read_text().strip()
                used = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                # Version 1 says "no limit" as the largest number of whole pages.
                if allowed != "max" and int(allowed) < 2**62 and held in used:
                    return int(allowed) - int(used[held])
                break
    return None


class AnonymousPeak:
    """Watch the anonymous memory of this process while something runs.

    Parameters
    ----------
    every
        Seconds between two looks; what comes and goes in between is missed.

    Attributes
    ----------
    baseline, peak
        Bytes at the start, and the most seen until now.

    Examples
    --------
    >>> with AnonymousPeak() as memory:
    ...     block = bytearray(50_000_000)
    >>> memory.peak - memory.baseline > 40_000_000
    True
    """

    def __init__(self, every: float = 0.02) -> None:
        self._every = every
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.baseline = 0
        self.peak = 0

    def __enter__(self) -> AnonymousPeak:
        self.baseline = self.peak = anonymous_bytes()
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, anonymous_bytes())
