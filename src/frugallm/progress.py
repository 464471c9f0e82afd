"""Progress of a long job, for people (a bar, or plain lines) and for programs (JSON lines).

The library reports events and never prints; whoever wants to see them passes a :class:`Progress`. Its events:

=========  ===========================================================================
``start``  a job begins; facts: ``model``, ``recipe``, …
``stage``  what is being done now; fact: ``text``
``block``  a decoder block is done and its shard durable; facts: ``index`` (from 1), ``of``
``note``   something worth knowing; fact: ``text``
``warn``   something that may be wrong; fact: ``text``
``done``   the job is finished; facts: ``out``, ``seconds``, …
=========  ===========================================================================

Any other kind with the facts ``index`` and ``of`` counts like a block (``window 2 of 8``).
"""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO, get_args

from frugallm.errors import ParameterError, nearest

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

Mode = Literal["auto", "bar", "json", "none"]
MODES: tuple[str, ...] = get_args(Mode)
_LINE_EVERY = 10.0  # seconds between plain lines that only count


class Progress:
    """Receives the events of a job and shows them.

    Parameters
    ----------
    mode
        ``"json"``: one JSON object per line; ``"bar"``: a bar with blocks done, time left and the current
        stage; ``"auto"``: the bar on a terminal, now and then a plain line elsewhere; ``"none"``: nothing.
    stream
        Where to write; standard error if not given.

    Examples
    --------
    >>> import sys
    >>> with Progress("json", stream=sys.stdout) as progress:
    ...     progress.event("block", index=3, of=30)
    {"event": "block", "index": 3, "of": 30}
    """

    def __init__(self, mode: Mode = "none", stream: TextIO | None = None) -> None:
        if mode not in MODES:
            raise ParameterError(
                f"progress must be one of {', '.join(MODES)}; got '{mode}'", nearest(mode, MODES)
            )
        self.mode: str = mode
        self.stream = sys.stderr if stream is None else stream
        if mode == "auto":
            self.mode = "bar" if self.stream.isatty() else "lines"
        self._started = time.monotonic()
        self._last_line = -_LINE_EVERY
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._counted = ""

    def event(self, kind: str, **facts: Any) -> None:
        """Report one event."""
        show = {"json": self._json, "bar": self._draw, "lines": self._line}.get(self.mode)
        if show is None:
            return
        try:
            show(kind, facts)
        except BrokenPipeError:  # nobody listens any more; the job matters more than its display
            self.mode = "none"

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _json(self, kind: str, facts: dict[str, Any]) -> None:
        self.stream.write(json.dumps({"event": kind, **facts}, default=str) + "\n")
        self.stream.flush()

    def _line(self, kind: str, facts: dict[str, Any]) -> None:
        elapsed = time.monotonic() - self._started
        if counts(facts):
            if elapsed - self._last_line < _LINE_EVERY and facts["index"] != facts["of"]:
                return
            self._last_line = elapsed
            self._write(f"{kind} {facts['index']} of {facts['of']}, {elapsed:.0f} s")
        elif kind == "warn":
            self._write(f"warning: {facts.get('text', '')}")
        elif "text" in facts:
            self._write(str(facts["text"]))

    def _write(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()

    def _draw(self, kind: str, facts: dict[str, Any]) -> None:
        bar = self._open_bar()
        if counts(facts):
            self._count(bar, kind, facts["index"], facts["of"])
        elif kind == "stage":
            self._describe(bar, str(facts.get("text", "")))
        elif kind == "warn":
            bar.console.print(
                f"warning: {facts.get('text', '')}", style="yellow", markup=False, highlight=False
            )
        elif kind == "done":
            self.close()
        elif "text" in facts:
            bar.console.print(str(facts["text"]), markup=False, highlight=False)

    def _open_bar(self) -> Bar:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.fields[unit]}"),
                MofNCompleteColumn(),
                BarColumn(bar_width=30),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
            )
            console = Console(file=self.stream, force_terminal=self.stream.isatty() or None)
            self._bar = Bar(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=None, unit="")
            self._counted = ""
            self._bar.start()
        return self._bar

    def _count(self, bar: Bar, unit: str, index: int, of: int) -> None:
        assert self._task is not None
        if unit != self._counted:  # a new kind of count starts its own clock
            self._counted = unit
            bar.reset(self._task, total=of, unit=f"{unit}s")
        bar.update(self._task, completed=index, total=of)

    def _describe(self, bar: Bar, text: str) -> None:
        assert self._task is not None
        bar.update(self._task, description=text)


def counts(facts: dict[str, Any]) -> bool:
    """Tell whether an event counts something (it has ``index`` and ``of``)."""
    return "index" in facts and "of" in facts
