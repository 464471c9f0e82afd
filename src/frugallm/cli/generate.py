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
    from frugallm.models import load

    network, tokenizer = load(model)

    import torch
    from transformers import TextStreamer

    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    writer: Any = network  # transformers declares generate in a way that type checkers misread
    writer.generate(
        **encode(tokenizer, prompt, raw),
        **sampling,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.eos_token_id,
    )


def encode(tokenizer: Any, prompt: str, raw: bool) -> dict[str, Any]:
    """Return the model's inputs ``(1, tokens)``: the prompt in the model's chat template, or as it is."""
    if raw or not tokenizer.chat_template:
        return dict(tokenizer(prompt, return_tensors="pt"))
    messages = [{"role": "user", "content": prompt}]
    return dict(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    )
