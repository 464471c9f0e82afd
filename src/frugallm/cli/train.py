"""``frugal train``: train a model with a recipe's rounding, objective and settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from frugallm.cli.options import (
    Debug,
    HeldOut,
    NewFolder,
    Overwrite,
    ProgressMode,
    Quiet,
    RecipeName,
    Seed,
    Threads,
    show_markdown,
)
from frugallm.cli.run import progress_of, read_recipe, resumable


def train(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="a name, a folder, a GGUF file, a hub id; from scratch also tiny or small"
        ),
    ],
    steps: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STEP[:key=value,…]…]", help="training methods; none: plain training"),
    ] = None,
    recipe: RecipeName = None,
    out: NewFolder = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="begin with new weights in MODEL's configuration")
    ] = False,
    shape: Annotated[
        str | None,
        typer.Option(metavar="key=value,…", help="from scratch: changes to the configuration"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")] = False,
    overwrite: Overwrite = False,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="text to train on: file, folder, data set")
    ] = None,
    seq_len: Annotated[int, typer.Option(metavar="N", help="tokens per window")] = 256,
    max_steps: Annotated[int, typer.Option(metavar="N", help="steps of the optimizer")] = 300,
    batch: Annotated[int, typer.Option(metavar="N", help="windows per step")] = 8,
    learning_rate: Annotated[
        float | None, typer.Option(metavar="X", help="the highest; default: the method's own")
    ] = None,
    seed: Seed = 0,
    save_every: Annotated[
        int | None, typer.Option(metavar="N", help="steps between checkpoints; default: ten in all")
    ] = None,
    eval_text: HeldOut = None,
    windows: Annotated[int, typer.Option(metavar="N", help="held-out windows of --seq-len tokens")] = 8,
    no_evaluate: Annotated[bool, typer.Option("--no-evaluate", help="do not measure the loss")] = False,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="type of tensors that stay as they are")
    ] = "bf16",
    threads: Threads = None,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train MODEL with the steps, verify the result, measure it, and write it to --out."""
    from frugallm.errors import OutputError

    chosen: Any = read_recipe(steps or [], recipe) if steps or recipe else ()
    changes = _shape(shape)
    if out is None:
        raise OutputError("a training needs a folder to write to", "Add --out DIR")
    shown = progress_of(progress, quiet)

    from frugallm.training.run import train as run_training

    with resumable(shown):
        report = run_training(
            model,
            chosen,
            out=out,
            from_scratch=from_scratch,
            shape=changes,
            resume=resume,
            overwrite=overwrite,
            text=text,
            seq_len=seq_len,
            max_steps=max_steps,
            batch=batch,
            learning_rate=learning_rate,
            seed=seed,
            save_every=save_every,
            eval_text=eval_text,
            windows=windows,
            evaluate=not no_evaluate,
            dtype=dtype,
            threads=threads,
            progress=shown,
        )
    if not quiet:
        show_markdown(report.to_markdown())


def _shape(written: str | None) -> dict[str, Any]:
    """Return the changes that ``--shape`` names."""
    from frugallm.errors import ParameterError, RecipeError
    from frugallm.step_syntax import parse_step

    try:
        return parse_step(f"shape:{written}")[1] if written else {}
    except RecipeError:
        raise ParameterError(
            f"cannot read --shape {written}", "Write key=value,key=value, for example hidden_size=256"
        ) from None
