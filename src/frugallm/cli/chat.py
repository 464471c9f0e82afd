"""``frugal chat``: talk with a model in the terminal."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

from frugallm.cli.generate import open_llm
from frugallm.cli.options import Debug, Model
from frugallm.errors import DataError

COMMANDS = {
    "/reset": "forget what was said",
    "/quit": "leave (so does Ctrl-D)",
    "/help": "show this",
}
REFRESHES = 12  # a second


def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="what the model is told beforehand")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="longest answer")] = 1024,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0: always the likeliest token")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="sample from this share only")
    ] = 0.95,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="seed of the sampling; else a new one")
    ] = None,
    debug: Debug = False,
) -> None:
    """Talk with MODEL. Ctrl-C ends an answer; /reset forgets, /quit leaves."""
    from frugallm.engine.sampling import SamplingParams

    if sys.stdin is None:  # closed by whoever started this
        raise DataError("standard input is closed", "A chat reads from a terminal, a file or a pipe")
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_new_tokens)
    llm = open_llm(model)
    if not llm.tokenizer.chat_template:
        raise DataError(f"{model} has no chat template", "Let it go on with a text: frugal generate --raw")
    talk = Talk(llm, params, system)
    screen: Any = Terminal(model) if sys.stdin.isatty() and sys.stdout.isatty() else Plain()
    for line in screen.lines():
        word = line.strip()
        if word == "/quit":
            return
        if word == "/reset":
            talk.reset()
            screen.say("What was said is forgotten.")
        elif word.startswith("/"):
            screen.say("\n".join(f"{name}  {what}" for name, what in COMMANDS.items()))
        elif word:
            try:
                screen.show(talk.answer(word))
            except DataError as error:
                screen.say(f"{error}. /reset forgets what was said")


class Talk:
    """A conversation: what was said, and the answer to what is said next.

    What was said before is known to the engine's cache and is not computed again.
    """

    def __init__(self, llm: Any, params: Any, system: str | None = None) -> None:
        self._llm, self._params, self._system = llm, params, system
        self.reset()

    def reset(self) -> None:
        """Forget everything but what the model is told beforehand."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, text: str) -> Iterator[str]:
        """Answer, piece by piece. What was answered is kept, also if somebody stops listening; a refusal is not."""
        said = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        events = self._llm.stream(said, self._params)
        try:
            for event in events:
                pieces.append(event.text)
                yield event.text
        finally:
            events.close()
            if pieces:
                self.messages = [*said, {"role": "assistant", "content": "".join(pieces)}]


class Plain:
    """A conversation through pipes: a line in, an answer out."""

    def lines(self) -> Iterator[str]:
        """Return what is said."""
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise DataError(f"what is said cannot be read ({error})", "Give it in UTF-8") from error

    def say(self, text: str) -> None:
        """Print a remark that is no answer."""
        typer.echo(text, err=True)

    def show(self, pieces: Iterator[str]) -> None:
        """Print an answer as it comes."""
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()


class Terminal:
    """A conversation on a terminal: Markdown is drawn paragraph by paragraph, the last one as it grows."""

    def __init__(self, model: str) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        with self._console.capture() as drawn:
            self._console.print("[bold cyan]you ›[/bold cyan] ", end="")
        self._question = drawn.get()
        with suppress(ImportError):
            import readline  # noqa: F401, gives input() arrow keys and a history

            # It draws the line again as it is edited, and must know what of the question takes no room.
            self._question = re.sub(r"(\033\[[0-9;]*m)", "\001\\1\002", self._question)
        self._console.print(f"[bold]{model}[/bold]  [dim]/help shows what there is to know[/dim]\n")

    def lines(self) -> Iterator[str]:
        """Ask until somebody leaves."""
        while True:
            try:
                yield input(self._question)
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return

    def say(self, text: str) -> None:
        """Print a remark that is no answer."""
        self._console.print(text, style="dim", markup=False)

    def show(self, pieces: Iterator[str]) -> None:
        """Draw an answer as it comes; Ctrl-C ends it."""
        from rich.live import Live
        from rich.markdown import Markdown
        from rich.spinner import Spinner

        waiting: Any = Spinner("dots", style="dim")
        growing, count, begin = "", 0, time.perf_counter()
        with (
            interruptible() as interrupted,
            Live(waiting, console=self._console, refresh_per_second=REFRESHES, transient=True) as live,
        ):
            for piece in pieces:
                count += 1
                done, growing = finished_part(growing + piece)
                if done:
                    live.console.print(Markdown(done), "")
                live.update(Markdown(growing))
                if interrupted():
                    break
        pieces.close()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - begin
        self._console.print(Markdown(growing))
        self._console.print(f"{count} tokens, {count / seconds:.1f} a second\n", style="dim")


def finished_part(text: str) -> tuple[str, str]:
    """Split Markdown behind its last paragraph that is complete; a block of code is in one piece.

    Returns
    -------
    tuple of str
        What nothing can change any more, and the rest.
    """
    fence = ""
    cut = 0
    place = 0
    for line in text.splitlines(keepends=True):
        place += len(line)
        mark = line.lstrip()[:3]
        if mark in ("```", "~~~") and (not fence or mark == fence):
            fence = "" if fence else mark
        if not fence and line == "\n":
            cut = place
    return text[:cut].strip("\n"), text[cut:]


@contextmanager
def interruptible() -> Iterator[Any]:
    """Have the first Ctrl-C noted rather than raised, so that it falls between two steps; the next one raises."""
    noted = []

    def note(*_: Any) -> None:
        noted.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)
