"""``frugal run``: compress a model, verify and measure the result."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from frugallm.cli.options import (
    Debug,
    HeldOut,
    Model,
    NewFolder,
    Overwrite,
    ProgressMode,
    Quiet,
    RecipeName,
    Seed,
    Threads,
    show_markdown,
)

if TYPE_CHECKING:
    from frugallm.progress import Progress
    from frugallm.recipe import Recipe


def run(
    model: Model,
    steps: Annotated[
        list[str] | None, typer.Argument(metavar="[STEP[:key=value,…]…]", help="methods, in order")
    ] = None,
    recipe: RecipeName = None,
    out: NewFolder = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where a killed run stopped")] = False,
    overwrite: Overwrite = False,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="calibration text: file, folder, data set")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="calibration windows")] = 128,
    seq_len: Annotated[int, typer.Option(metavar="N", help="tokens per calibration window")] = 512,
    seed: Seed = 0,
    eval_text: HeldOut = None,
    windows: Annotated[int, typer.Option(metavar="N", help="evaluation windows of 2048 tokens")] = 8,
    no_evaluate: Annotated[bool, typer.Option("--no-evaluate", help="do not measure quality")] = False,
    shares: Annotated[
        bool,
        typer.Option(
            "--shares",
            help="measure what each step gives by leaving it out; one more compression and evaluation a step",
        ),
    ] = False,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="type of tensors that stay uncompressed")
    ] = "bf16",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="where to compute")] = "cpu",
    threads: Threads = None,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL with the steps, verify the result, measure it, and write it to --out."""
    from frugallm.errors import OutputError

    chosen = read_recipe(steps or [], recipe)
    if out is None:
        raise OutputError("a run needs a folder to write to", "Add --out DIR")
    shown = progress_of(progress, quiet)

    from frugallm.compression import run as run_job

    with resumable(shown):
        report = run_job(
            model,
            chosen,
            out=out,
            resume=resume,
            overwrite=overwrite,
            text=text,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            eval_text=eval_text,
            windows=windows,
            evaluate=not no_evaluate,
            shares=shares,
            dtype=dtype,
            device=device,
            threads=threads,
            progress=shown,
        )
    if not quiet:
        show_markdown(report.to_markdown())
        typer.echo(f"The page with plots: {out / 'report.html'}")


def progress_of(mode: str, quiet: bool) -> Progress:
    """Return what shows a job's progress as ``--progress`` and ``--quiet`` say."""
    from frugallm.progress import Progress

    shown = Progress(mode)  # type: ignore[arg-type]
    return Progress("none") if quiet else shown


@contextmanager
def resumable(shown: Progress) -> Iterator[None]:
    """Show progress of the job that runs inside; on Ctrl-C say the command that goes on with it."""
    try:
        with interruptible(), shown:
            yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted; continue with: {resume_command(sys.argv[1:])}", err=True)
        raise


@contextmanager
def interruptible() -> Iterator[None]:
    """End what runs inside as KeyboardInterrupt on Ctrl-C, even where a library makes another error of it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = threading.Event()

    def press(number: int, frame: object) -> None:
        pressed.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    try:
        yield
    except Exception as error:
        if pressed.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def read_recipe(steps: list[str], recipe: str | None) -> Recipe:
    """Return the recipe that a command line names: a file's steps, then those written out."""
    from frugallm.recipe import Recipe

    if recipe is None:
        return Recipe.parse(steps)
    loaded = Recipe.load(recipe)
    if not steps:
        return loaded
    return Recipe(steps=(*loaded.steps, *Recipe.parse(steps).steps), title=loaded.title, why=loaded.why)


def resume_command(arguments: list[str]) -> str:
    """Return the same command with ``--resume``."""
    kept = [a for a in arguments if a not in ("--resume", "--overwrite")]
    return shlex.join(["frugal", *kept, "--resume"])
