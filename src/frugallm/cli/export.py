"""``frugal export``: a model or a result in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frugallm.cli.options import Debug


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_DIR", help="a folder that 'frugal run' wrote; for GGUF any model"),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="the format to write: dense, gptq, awq, bitsandbytes, or gguf:TYPE"
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="where to write; default: beside the model")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
    tables: Annotated[
        str | None, typer.Option(metavar="TYPE", help="GGUF: type of embedding and head; default: Q8_0")
    ] = None,
    imatrix: Annotated[
        bool, typer.Option("--imatrix", help="GGUF: weigh errors by the importance of input channels")
    ] = False,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="text for --imatrix: file, folder, data set")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="windows for --imatrix")] = 128,
    seq_len: Annotated[int, typer.Option(metavar="N", help="tokens per window for --imatrix")] = 512,
    seed: Annotated[int, typer.Option(metavar="N", help="seed of the choice of windows")] = 0,
    debug: Debug = False,
) -> None:
    """Write a model in another format: a result as a plain folder, anything as a GGUF file."""
    from frugallm.formats.export import export as write
    from frugallm.progress import Progress

    with Progress("auto") as shown:
        written = write(
            model,
            to,
            out,
            shown,
            overwrite=overwrite,
            tables=tables,
            imatrix=imatrix,
            text=text,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
        )
    typer.echo(f"{written} written")
