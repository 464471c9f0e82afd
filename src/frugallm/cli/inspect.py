"""``frugal inspect``: what a model is made of, and what can be done with it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from frugallm.cli.options import Debug, Model

if TYPE_CHECKING:
    from frugallm.models.checkpoint import Checkpoint


def inspect(model: Model, debug: Debug = False) -> None:
    """Show parts, shapes and bytes of MODEL, the group sizes that fit it, and which methods apply."""
    from frugallm.models import open_checkpoint

    checkpoint = open_checkpoint(model, compressed=True)
    for line in describe(checkpoint):
        typer.echo(line)


def describe(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the lines that describe a model."""
    from frugallm.compress.contract import fitting_group_sizes
    from frugallm.formats.packed_folder import PackedFolder

    config, family = checkpoint.config, checkpoint.family
    tied = ", head tied to the embedding" if config.tie_word_embeddings else ""
    yield f"{checkpoint.name}: {config.model_type}, {config.num_hidden_layers} blocks{tied}"
    yield ""
    yield f"{'part':<16}{'tensors':>8}{'parameters':>16}{'bytes in bf16':>16}{'share':>8}"
    sizes = part_sizes(checkpoint)
    total = sum(count for _, count in sizes.values())
    for part, (tensors, count) in {**sizes, "all": (len(checkpoint.names()), total)}.items():
        yield f"{part:<16}{tensors:>8}{count:>16,}{2 * count:>16,}{count / total:>8.1%}"
    yield ""
    yield "linears of a block (out, in):"
    first = family.block(0)
    widths, alike = {}, Counter[tuple[str, int, int]]()
    for linear in family.linears(config, 0):
        rows, widths[linear] = checkpoint.shape(f"{first}.{linear}.weight")
        alike[re.sub(r"\.\d+\.", ".*.", linear), rows, widths[linear]] += 1  # experts are many and equal
    for (linear, rows, width), count in alike.items():
        yield f"  {linear:<24}{rows:>7} x {width}" + (f"   ({count} of them)" if count > 1 else "")
    fitting = ", ".join(map(str, fitting_group_sizes(widths))) or "none from 16 up"
    yield f"group sizes that divide every input width: {fitting}"
    yield ""
    if isinstance(checkpoint, PackedFolder):
        yield f"compressed already: {checkpoint.summary()}; {len(checkpoint.packed)} parts"
        bits = checkpoint.bits_per_weight()
        if math.isfinite(bits):
            yield f"{bits:.3f} bits a weight in the compressed linears, with everything that is stored about them"
        yield "methods: none, they start from the original model"
        return
    yield "methods:"
    yield from _applicable(checkpoint)


def part_sizes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Return for each part of a model how many tensors and how many parameters it has."""
    family = checkpoint.family
    starts = {"embedding": family.embedding, "blocks": family.blocks, "head": family.head}
    sizes: dict[str, tuple[int, int]] = {}
    for name in checkpoint.names():
        part = next((p for p, start in starts.items() if name.startswith(f"{start}.")), "final norm")
        tensors, count = sizes.get(part, (0, 0))
        sizes[part] = (tensors + 1, count + math.prod(checkpoint.shape(name)))
    return sizes


def _applicable(checkpoint: Checkpoint) -> Iterator[str]:
    from frugallm.catalogue import methods
    from frugallm.compress.plan import make_plan
    from frugallm.compress.prepare import prepared
    from frugallm.errors import FrugalError
    from frugallm.inference.contract import InferenceMethod
    from frugallm.training.contract import TrainMethod

    for name, method in methods().items():
        if issubclass(method, TrainMethod):
            yield f"  {name:<16}{method.card.summary} (frugal train)"
            continue
        if issubclass(method, InferenceMethod):
            reason = method().why_not(checkpoint.config)
            yield f"  {name:<16}{f'does not act: {reason}' if reason else f'{method.card.summary} (frugal generate)'}"
            continue
        try:
            step = method()
            plan = make_plan([step], prepared([step], checkpoint, 0))
        except FrugalError as error:
            yield f"  {name:<16}does not apply with its defaults: {error}"
        else:
            yield f"  {name:<16}{method.card.summary}"
            later = ("how each linear is stored is chosen when the work begins",) if plan.choosers else ()
            yield from (f"  {'':<16}{note}" for note in (*plan.notes, *later))
