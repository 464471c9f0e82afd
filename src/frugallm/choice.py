"""How each linear is stored, where steps of a recipe choose that: chosen once, when the work begins, and kept with it.

A plan holds what the rounding steps ask for. Choosing steps look at the weights, and some at statistics of a calibration
text, and change it linear by linear; every step works with what the one before it chose.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from frugallm.compress.contract import BlockMethod, together
from frugallm.compress.plan import Plan
from frugallm.errors import RecipeError
from frugallm.formats import shards
from frugallm.formats.engines import engines_for
from frugallm.formats.quantized_tensor import WeightScheme
from frugallm.models.checkpoint import Checkpoint
from frugallm.progress import Progress
from frugallm.walk.importance import input_statistics

#: Of the calibration windows: means over so many tokens are steady.
WINDOWS = 32


def settle(
    plan: Plan,
    checkpoint: Checkpoint,
    windows: Tensor | None,
    kept: Path,
    *,
    fast: torch.dtype,
    hidden_limit: int,
    progress: Progress,
) -> Plan:
    """Return the plan with every linear stored as its choosing steps choose now, or as they chose before a break.

    Parameters
    ----------
    windows
        Calibration tokens ``(windows, length)``, if any choosing step reads text.
    kept
        File of the choice; it is written before anything is stored by it, and read where it is there already.
    fast
        Type of products.
    """
    if not plan.choosers:
        return plan
    if kept.exists():
        content = json.loads(kept.read_text(encoding="utf-8"))
        chosen = {name: WeightScheme(**fields) for name, fields in content.items()}
    else:
        progress.event("stage", text="choosing how each linear is stored")
        needs = frozenset().union(*(step.scheme_needs for step in plan.choosers))
        statistics = {}
        if needs:
            assert windows is not None
            statistics = input_statistics(
                checkpoint,
                windows[:WINDOWS],
                needs,
                kept.parent,
                fast=fast,
                hidden_limit=hidden_limit,
                progress=progress,
                event="inputs of block",
            )
        chosen = choose_schemes(plan, checkpoint, statistics)
        content = {name: scheme.model_dump(mode="json") for name, scheme in chosen.items()}
        shards.write_bytes(kept, json.dumps(content).encode())
    settled = plan.with_schemes(chosen)
    notes = [_note(settled, checkpoint), *_lost_engines(plan, settled)]
    for note in notes:
        progress.event("note", text=note)
    return replace(settled, notes=(*plan.notes, *notes))


def choose_schemes(
    plan: Plan, checkpoint: Checkpoint, statistics: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, WeightScheme]:
    """Let the choosing steps of a plan choose, in the order of the recipe, each from what the one before chose.

    Parameters
    ----------
    statistics
        Full name of each linear to the statistics in the ``scheme_needs`` of these steps.

    Returns
    -------
    dict
        Full name of each linear of the plan to how its weights are stored.

    Raises
    ------
    RecipeError
        If a step gives linears that share an input, and are planned alike, different schemes, or if the step that
        rounds cannot do so as was chosen.
    """
    chosen = plan.schemes()
    for step in plan.choosers:
        planned = {name: scheme for name, scheme in chosen.items() if step.touches(name)}
        found = step.schemes(checkpoint, planned, statistics)
        for name, scheme in found.items():
            _check(step, plan.linears[name].solver, planned[name], scheme)
        for names in together(checkpoint, planned):
            pairs = {(planned[name], found[name]) for name in names}
            if len(pairs) > len({asked for asked, _ in pairs}):
                labels = ", ".join(f"{name} {found[name].label()}" for name in names)
                raise RecipeError(
                    f"{step.name()} stores linears that engines fuse in different ways: {labels}",
                    "Its schemes() must give linears that share an input one scheme",
                )
        chosen.update(found)
    return chosen


def _check(step: BlockMethod, solver: BlockMethod, asked: WeightScheme, chosen: WeightScheme) -> None:
    """Raise unless ``solver`` can store what ``step`` has chosen in the place of what was asked for."""
    mend = "Leave out one of both, or give them different linears with only and skip"
    if chosen != asked and not solver.flexible:
        raise RecipeError(f"{step.name()} before {solver.name()}: its grid is fixed, {asked.label()}", mend)
    try:
        WeightScheme.model_validate(
            chosen.model_dump()
        )  # a copy with other values is not checked when it is made
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        raise RecipeError(
            f"{step.name()} before {solver.name()}: {chosen.label()} cannot be: {what}", mend
        ) from None


def bits_per_weight(schemes: Mapping[str, WeightScheme], checkpoint: Checkpoint) -> float:
    """Return the mean bits that a weight of these linears (full names) takes, scales and zero points included."""
    shapes = {name: checkpoint.shape(f"{name}.weight") for name in schemes}
    stored = sum(8 * schemes[name].stored_bytes(*shape) for name, shape in shapes.items())
    return stored / sum(map(math.prod, shapes.values()))


def _note(plan: Plan, checkpoint: Checkpoint) -> str:
    """Say in which forms linears are stored after the choice, and how many bits that takes."""
    schemes = {
        n: p.scheme.weights for n, p in plan.linears.items() if any(s.touches(n) for s in plan.choosers)
    }
    counts = Counter(scheme.label() for scheme in schemes.values())
    forms = ", ".join(f"{label} ({count} linears)" for label, count in sorted(counts.items()))
    names = " and ".join(dict.fromkeys(step.name() for step in plan.choosers))
    bits = bits_per_weight(schemes, checkpoint)
    counted = "scales included" + (", extras not" if any(s.extras for s in schemes.values()) else "")
    return f"{names} chose {forms}: {bits:.3f} bits per weight, {counted}"


def _lost_engines(asked: Plan, chosen: Plan) -> Iterator[str]:
    """Say which engines load what was asked for, but not what was chosen."""
    load = {(row.engine, row.device) for row in engines_for(chosen) if row.seen != "no"}
    for row in engines_for(asked):
        if row.seen != "no" and (row.engine, row.device) not in load:
            sizes = " or ".join(str(size) if size else "the row" for size in row.groups)
            yield (
                f"{row.engine} on {row.device} does not load what was chosen, it takes "
                f"{' or '.join(map(str, row.weights))} bits in groups of {sizes or 'any size'}"
            )
