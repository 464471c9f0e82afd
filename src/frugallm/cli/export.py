"""``frugal export``: a result in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frugallm.cli.options import Debug


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that 'frugal run' wrote")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="the format to write")],
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="where to write; default: beside DIR")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the model in DIR in another format."""
    from frugallm.formats.export import export as write
    from frugallm.progress import Progress

    with Progress("auto") as shown:
        written = write(folder, to, out, shown)
    typer.echo(f"{written} written")
