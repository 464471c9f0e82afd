"""``frugal methods``: the survey's table and what of it works, or one method and where its result loads."""

from __future__ import annotations

import json as json_format
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frugallm.cli.options import Debug

if TYPE_CHECKING:
    from frugallm.catalogue import Entry

STYLES = {"works": "green", "preview": "yellow", "planned": "dim"}


def methods(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="one method: what it is, and where its result loads")
    ] = "",
    section: Annotated[
        str, typer.Option(metavar="TEXT", help="only sections that contain this text, e.g. 1.1.1")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="print the table as JSON")] = False,
    debug: Debug = False,
) -> None:
    """List the rows of the survey with their state and methods, or show one method and where its result loads."""
    from frugallm.catalogue import survey, unlisted

    if name:
        show_one(name, section, json=json)
        return
    entries = survey(section)
    if json:
        typer.echo(json_format.dumps([entry.model_dump(mode="json") for entry in entries], indent=1))
        return
    show(entries)
    if not section:
        typer.echo("Without a row of their own: " + ", ".join(entry.name for entry in unlisted()))


def show_one(name: str, section: str, *, json: bool) -> None:
    """Print one method: its card in short, and where its result loads."""
    from dataclasses import asdict

    from frugallm.catalogue import find_method, method_entry
    from frugallm.cli.options import show_markdown
    from frugallm.errors import ParameterError
    from frugallm.handoff import places
    from frugallm.pages import where_it_loads

    if section:
        raise ParameterError(
            f"--section chooses among all methods, not within {name}", "Leave one of them out"
        )
    method = find_method(name)
    entry, card = method_entry(method.name(), method), method.card
    if json:
        found = [asdict(place) for place in places(method())]
        typer.echo(json_format.dumps({**entry.model_dump(mode="json"), "loads": found}, indent=1))
        return
    claim = f"{card.claim} {claim_text(entry.claim) or 'not measured yet with the code as it is'}."
    lines = [f"# {card.title} ({entry.state})", "", card.summary, "", f"Claim: {claim}"]
    show_markdown("\n".join([*lines, "", *where_it_loads(method)]))


def show(entries: list[Entry]) -> None:
    """Print the table, one part per section."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for section in dict.fromkeys(entry.section for entry in entries):
        table = Table(
            title=escape(section), title_justify="left", title_style="bold", box=None, pad_edge=False
        )
        for heading, width in {"id": 20, "state": 8, "methods": 12}.items():
            table.add_column(heading, min_width=width, no_wrap=True)
        table.add_column("name", overflow="fold")
        table.add_column("claim", overflow="fold")
        for entry in (entry for entry in entries if entry.section == section):
            names = ", ".join(method.name for method in entry.methods)
            state = f"[{STYLES[entry.state]}]{entry.state}[/]"
            table.add_row(entry.id, state, names, escape(entry.name), escape(claim_text(entry.claim)))
        console.print(table, "")
    counts = {state: sum(entry.state == state for entry in entries) for state in STYLES}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))


def claim_text(claim: dict[str, Any] | None) -> str:
    """Return a claim in a few words: ``kl 0.51 against 0.93 (rtn W3), held``."""
    if claim is None:
        return ""
    verdict = "held" if claim["passed"] else "not held"
    values = f"{claim['metric']} {claim['value']:.4g} against {claim['baseline_value']:.4g}"
    return f"{values} ({claim['baseline']}), {verdict}"
