"""``frugal docs``: the pages that are made from the code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frugallm.cli.options import Debug


def docs(
    to: Annotated[Path, typer.Option(metavar="DIR", help="folder of the pages")] = Path("docs"),
    check: Annotated[bool, typer.Option("--check", help="write nothing; fail if a page is stale")] = False,
    debug: Debug = False,
) -> None:
    """Write a page per method, the survey's outline and the list of commands; or check them."""
    from frugallm.cli.main import app
    from frugallm.cli.reference import command_page
    from frugallm.pages import method_pages, stale, write

    pages = {"cli.md": command_page(app), **method_pages()}
    if not check:
        for path in write(pages, to):
            typer.echo(path)
        return
    behind = stale(pages, to)
    if behind:
        from frugallm.errors import FrugalError

        raise FrugalError(f"not as the code says: {', '.join(map(str, behind))}", "Run: frugal docs")
