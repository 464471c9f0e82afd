"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a name, a folder, a GGUF file, or a hub id")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]

# Of commands that write a model.
RecipeName = Annotated[str | None, typer.Option(metavar="FILE_OR_NAME", help="steps from a recipe")]
NewFolder = Annotated[Path | None, typer.Option(metavar="DIR", help="folder to write; must not exist")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the output folder")]
Seed = Annotated[int, typer.Option(metavar="N", help="seed of every random choice")]
HeldOut = Annotated[str | None, typer.Option(metavar="TEXT", help="held-out text to measure on")]
Threads = Annotated[int | None, typer.Option(metavar="N", help="processor threads; default: all cores")]
ProgressMode = Annotated[str, typer.Option(metavar="MODE", help="auto, bar, json or none")]
Quiet = Annotated[bool, typer.Option("--quiet", help="print errors only")]


def show_markdown(text: str) -> None:
    """Print Markdown: drawn on a terminal, as it is elsewhere."""
    if not sys.stdout.isatty():
        typer.echo(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
