"""``frugal check``: the conformance checks of a method."""

from __future__ import annotations

from typing import Annotated

import typer

from frugallm.cli.options import Debug


def check(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="a name, or the path of a Python file")],
    record: Annotated[
        bool, typer.Option("--record", help="keep the result inside the package, for 'frugal methods'")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run every check that a method of its family must pass."""
    from frugallm.catalogue import find_method

    found = find_method(method)

    from frugallm.conformance import check as run_checks

    outcomes = run_checks(found)
    for outcome in outcomes:
        mark = "passed" if outcome.passed else "FAILED"
        typer.echo(f"{mark}  {outcome.name}" + (f": {outcome.reason}" if outcome.reason else ""))
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    typer.echo(f"{found.name()}: {len(outcomes) - len(failed)} of {len(outcomes)} checks passed")
    if failed:
        raise typer.Exit(1)
    if record:
        typer.echo(f"recorded in {keep(found, [outcome.name for outcome in outcomes])}")


def keep(method: type, checks: list[str]) -> str:
    """Write the record of a method that passed and return where it is."""
    from datetime import UTC, datetime

    from frugallm.catalogue import Conformance, write_record
    from frugallm.reproduce import installed_versions

    today = datetime.now(UTC).date().isoformat()
    passed = Conformance(passed=len(checks), checks=tuple(checks), date=today, versions=installed_versions())
    return str(write_record(method, conformance=passed))
