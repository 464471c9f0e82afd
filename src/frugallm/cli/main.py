"""The command ``frugal``: one file per subcommand, and one place where errors become a line and a status."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from frugallm import __version__
from frugallm.cli import (
    bench,
    chat,
    check,
    docs,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    methods,
    new,
    reproduce,
    run,
    train,
)
from frugallm.errors import FrugalError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="frugal",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for module in (
    run,
    train,
    evaluate,
    generate,
    chat,
    bench,
    inspect,
    doctor,
    methods,
    reproduce,
    check,
    new,
    docs,
    export,
):
    name = module.__name__.rpartition(".")[2]
    app.command(name)(getattr(module, name))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"frugallm {__version__}")
        raise typer.Exit


@app.callback()
def frugal(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="show the version")
    ] = False,
) -> None:
    """Make a language model cheaper, measure what that cost, and hand it on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Returns
    -------
    int
        0 done, 1 the job failed, 2 bad input, 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(given or ["--help"], prog_name="frugal", standalone_mode=False)
        return status if isinstance(status, int) else DONE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        line, status = explain(error)
        typer.echo(line, err=True)
        if "--debug" in given:
            traceback.print_exception(error)
        return status


def explain(error: Exception) -> tuple[str, int]:
    """Return the one line that an error is worth, and the exit status."""
    if isinstance(error, FrugalError):
        return f"error: {error}", error.status
    if hasattr(error, "format_message"):  # a usage error of the command line
        return f"error: {_one_line(error.format_message()).rstrip('.')}. {_see_help(error)}", BAD_INPUT
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"error: {error.strerror or _one_line(str(error))}{where}. {_mend(error.errno)}", FAILED
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return (
            "error: out of memory. Free some, or take fewer or shorter windows (--samples, --seq-len)",
            FAILED,
        )
    what = f"{type(error).__name__}: {_one_line(str(error))}"
    return f"internal error: {what}. Run again with --debug and report what it shows", FAILED


def _see_help(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return f"'{context.command_path if context else 'frugal'} --help' shows how"


def _mend(number: int | None) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space or choose another disk"
    if number == errno.EFBIG:
        return "Choose a disk that takes larger files, or raise the limit (ulimit -f)"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return "Choose a place that can be written"
    return "Run again with --debug for the details"


def _one_line(text: str) -> str:
    return " ".join(text.split())
