"""``frugal reproduce``: the claims of methods, checked on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frugallm.cli.options import Debug

RESULTS, PAGE = Path("results"), Path("docs/results.md")


def reproduce(
    methods: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD…]", help="which; default: all")
    ] = None,
    model: Annotated[
        str, typer.Option(help="a model that no grid fits by construction")
    ] = "smollm2-135m-offgrid",
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="calibration text")] = None,
    eval_text: Annotated[str | None, typer.Option(metavar="TEXT", help="held-out text")] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="calibration windows")] = 128,
    record: Annotated[
        bool, typer.Option("--record", help="keep the results inside the package, for 'frugal methods'")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check claims on MODEL; write results/MODEL/METHOD.json and docs/results.md."""
    from frugallm.catalogue import find_method
    from frugallm.catalogue import methods as all_methods

    chosen = [find_method(name) for name in methods] if methods else list(all_methods().values())

    from frugallm.cli.methods import claim_text
    from frugallm.evaluate.bench import Bench
    from frugallm.progress import Progress
    from frugallm.reproduce import able, results_page
    from frugallm.reproduce import reproduce as check_claims

    with Progress("auto") as shown:
        chosen = able(chosen, bool(methods), shown)
        shown.event("stage", text=f"reading {model}")
        bench = Bench(model, text, eval_text, samples=samples)
        for result in check_claims(chosen, bench, RESULTS, record, shown):
            shown.event("note", text=f"{result.method}: {claim_text(result.claim.model_dump())}")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(results_page(RESULTS), encoding="utf-8")
    typer.echo(f"{PAGE} written")
