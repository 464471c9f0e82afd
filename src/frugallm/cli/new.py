"""``frugal new``: begin a method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frugallm.cli.options import Debug


def new(
    family: Annotated[
        str, typer.Argument(metavar="FAMILY", help="folder of the method: quantize or unstructured")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="name of the method, in snake_case")],
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder to write to; default: the family's own")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a small method that works, to be made into yours."""
    from frugallm.skeleton import write_skeleton

    path = write_skeleton(family, name, to)
    typer.echo(f"{path} written; make it yours, then: frugal check {name if to is None else path}")
