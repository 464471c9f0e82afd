"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a name, a folder, a GGUF file, or a hub id")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def show_markdown(text: str) -> None:
    """Print Markdown: drawn on a terminal, as it is elsewhere."""
    if not sys.stdout.isatty():
        typer.echo(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
