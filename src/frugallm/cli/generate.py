"""``frugal generate``: let a model answer, token by token."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from frugallm.cli.options import Debug, Model


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", metavar="TEXT", help="what to say to the model")],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="stop after so many tokens")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0: always the likeliest token")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="sample from this share only")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="seed of the sampling")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="do not apply the chat template")] = False,
    debug: Debug = False,
) -> None:
    """Print what MODEL writes after the prompt, as it writes it."""
    from frugallm.engine.sampling import SamplingParams

    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_new_tokens)
    llm = open_llm(model)
    messages = [{"role": "user", "content": prompt}]
    for event in llm.stream(prompt if raw or not llm.tokenizer.chat_template else messages, params):
        typer.echo(event.text, nl=False)
    typer.echo()


def open_llm(model: str) -> Any:
    """Open a model for the engine, and say how it runs where that is not the usual way."""
    from frugallm.engine.llm import LLM

    llm = LLM(model)
    if llm.note:
        typer.echo(f"note: {llm.note}", err=True)
    return llm
