"""A recipe without one of its steps: what is left, and what plain form takes the step's place.

What a step does by its method goes; what form it gives to the result stays, or a recipe that stores less would be
compared with one that stores more. So a step that rounds weights leaves ``rtn`` behind on the same grid, one that rounds
inputs leaves ``inputs``, one that prunes leaves ``magnitude``. Any other step is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, get_args

from frugallm.compress.contract import BlockMethod
from frugallm.compress.plan import make_plan
from frugallm.compress.prepare import prepared
from frugallm.compress.prune.unstructured.magnitude import Magnitude
from frugallm.compress.quantize.inputs import Inputs
from frugallm.compress.quantize.number_formats import NumberFormat
from frugallm.compress.quantize.rtn import RTN
from frugallm.errors import ParameterError, RecipeError
from frugallm.formats.quantized_tensor import WeightScheme
from frugallm.method import Method

if TYPE_CHECKING:
    from frugallm.compress.plan import Plan
    from frugallm.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Remainder:
    """A recipe without one step: all ``steps`` that are left, those ``instead`` of it among them."""

    steps: tuple[Method, ...]
    instead: tuple[BlockMethod, ...] = ()


def leave_out(
    steps: Sequence[Method],
    index: int,
    checkpoint: Checkpoint,
    seed: int = 0,
    chosen: Mapping[str, WeightScheme] | None = None,
) -> Remainder:
    """Return what is left of ``steps`` without the one at ``index``.

    Parameters
    ----------
    checkpoint
        The model as it was given, before any step has prepared it.
    seed
        Of what prepares the model.
    chosen
        Full name of each rounded linear to its scheme, where a step chose that when the work began: the plain form of a
        step that chooses bits has the mean of them.

    Raises
    ------
    RecipeError, ParameterError
        If nothing is left, if the step is the plain form itself, or if what is left makes no sense on this model.
    """
    step, before = steps[index], prepared(steps, checkpoint, seed)
    plan = make_plan(steps, before)
    instead = stand_ins(step, plan, before, chosen or plan.schemes()) if isinstance(step, BlockMethod) else ()
    if step in instead:
        raise RecipeError(f"{step.name()} is itself the plain form that would take its place")
    if len(steps) == 1 and not instead:
        raise RecipeError(f"nothing is left without {step.name()}")
    rounding = tuple(s for s in instead if isinstance(s, RTN))
    others = tuple(s for s in instead if s not in rounding)
    rest = (*steps[:index], *others, *steps[index + 1 :])
    checkpoint = prepared(rest, checkpoint, seed)
    refused: RecipeError | None = None
    # Methods that round where nobody else does stand in front of steps that a plain rounding has to follow.
    for place in range(index + len(others), len(rest) + 1):
        candidate = (*rest[:place], *rounding, *rest[place:])
        try:
            make_plan(candidate, checkpoint)
        except RecipeError as error:
            refused = refused or error
        else:
            return Remainder(candidate, (*others, *rounding))
        if not rounding:
            break
    assert refused is not None
    raise refused


def stand_ins(
    step: BlockMethod, plan: Plan, checkpoint: Checkpoint, chosen: Mapping[str, WeightScheme]
) -> tuple[BlockMethod, ...]:
    """Return the plain steps that give linears the form that ``step`` gives them in ``plan``; none if it gives none.

    ``checkpoint`` is the model that the plan was made for, and ``chosen`` how each linear is stored.
    """
    touched = {name for name in checkpoint.linears() if step.touches(name)}
    sparse: dict[Any, list[str]] = {}
    inputs: dict[Any, list[str]] = {}
    for name, pruned in plan.pruned.items():
        if pruned.pruner is step:
            sparse.setdefault((pruned.zeros.share, pruned.zeros.pattern), []).append(name)
    for name, linear in plan.linears.items():
        if linear.rounder is step and linear.scheme.activations is not None:
            rounded = linear.scheme.activations
            scale = "token" if rounded.dynamic else "static"
            inputs.setdefault((rounded.bits, scale), []).append(name)
    widths = {
        n: checkpoint.shape(f"{n}.weight")[1] for n, linear in plan.linears.items() if linear.solver is step
    }
    found: list[BlockMethod] = [
        Magnitude(sparsity=share, pattern=pattern, **_where(step, names, touched))
        for (share, pattern), names in sparse.items()
    ]
    found += [
        Inputs(bits=bits, scale=scale, **_where(step, n, touched)) for (bits, scale), n in inputs.items()
    ]
    scheme = step.weights(widths) if widths else None
    if scheme is not None:
        if step.chooses:
            scheme = scheme.model_copy(update={"bits": _mean_bits(chosen, widths, checkpoint)})
        found.append(_rounding(step, scheme, widths, _where(step, widths, touched)))
    return tuple(found)


def _where(step: BlockMethod, names: Collection[str], touched: set[str]) -> dict[str, Any]:
    """Return ``only`` and ``skip`` for these linears: the step's own, where they are all that it works on."""
    if set(names) == touched:
        return {"only": step.only, "skip": step.skip}
    return {"only": tuple(names)}


def _mean_bits(chosen: Mapping[str, WeightScheme], names: Collection[str], checkpoint: Checkpoint) -> int:
    weights = {name: math.prod(checkpoint.shape(f"{name}.weight")) for name in names}
    return round(sum(chosen[name].bits * count for name, count in weights.items()) / sum(weights.values()))


def _rounding(
    step: BlockMethod, scheme: WeightScheme, widths: Mapping[str, int], where: dict[str, Any]
) -> RTN:
    """Return ``rtn`` on the grid of ``scheme``; where it has none, as near as it comes with the same bits and groups."""
    nearest: dict[tuple[bool, bool], RTN] = {}
    for fields in _settings(step, scheme):
        plain = RTN(bits=scheme.bits, symmetric=scheme.symmetric, **fields, **where)
        try:
            found = plain.weights(widths)
        except ParameterError:  # a number format with other bits or groups
            continue
        if found.group_size == scheme.group_size:
            near = (found.grid == scheme.grid, found.scale_dtype == scheme.scale_dtype)
            nearest.setdefault(near, plain)
    if not nearest:
        raise RecipeError(f"rtn has no grid like that of {step.name()}, {scheme.label()}")
    return nearest[max(nearest)]


def _settings(step: BlockMethod, scheme: WeightScheme) -> Iterator[dict[str, Any]]:
    """Yield number formats and group sizes: as the step says them, as they are by default, and written out."""
    formats = get_args(NumberFormat)
    own = getattr(step, "grid", None)  # the name means something else in some methods
    groups = [getattr(step, "group_size", None), None, scheme.group_size or -1]
    for grid, group in product(sorted(formats, key=lambda name: name != own), groups):
        yield {"grid": grid, "group_size": group}
