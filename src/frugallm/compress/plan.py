"""What a recipe means for a given model: every linear's scheme and solver, checked before any work begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from frugallm.compress.contract import GROUP_SIZES, BlockMethod, TableMethod, matches
from frugallm.errors import ParameterError, RecipeError
from frugallm.formats.quantized_tensor import ActivationScheme, LinearScheme, WeightScheme
from frugallm.method import Method

if TYPE_CHECKING:
    from frugallm.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class LinearPlan:
    """How one linear will be stored, and which step chooses its values."""

    scheme: LinearScheme
    solver: BlockMethod


@dataclass(frozen=True)
class TablePlan:
    """How the embedding or the head will be stored, and by which step."""

    scheme: WeightScheme
    solver: TableMethod


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against a model.

    Attributes
    ----------
    rewrites
        Steps that rewrite blocks before they are solved, in order.
    linears
        Full name of each linear that will be compressed, in the order of computation.
    tables
        Names of the embedding and, where it is a weight of its own, the head.
    left_alone
        Full names of block linears that no step stores.
    notes
        What the run should say about choices it made.
    """

    rewrites: tuple[BlockMethod, ...]
    linears: dict[str, LinearPlan]
    tables: dict[str, TablePlan]
    left_alone: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


def make_plan(steps: Sequence[Method], checkpoint: Checkpoint) -> Plan:
    """Resolve ``steps`` against the shapes of a model.

    Raises
    ------
    RecipeError
        If the steps make no sense together or in this order.
    ParameterError
        If a parameter does not fit the model.
    """
    if not steps:
        raise RecipeError(
            "a run needs at least one step", "For example: frugal run MODEL gptq:bits=4 --out DIR"
        )
    family = checkpoint.family
    names = [
        f"{family.block(i)}.{linear}"
        for i in range(checkpoint.config.num_hidden_layers)
        for linear in family.linears
    ]
    widths = {name: checkpoint.shape(f"{name}.weight")[1] for name in names}
    blocks = [s for s in steps if isinstance(s, BlockMethod)]
    tables = [s for s in steps if isinstance(s, TableMethod)]
    for step in steps:
        if not isinstance(step, BlockMethod | TableMethod):
            raise RecipeError(f"'{step.name()}' is not a post-training compression step")
    for step in blocks:
        _check_patterns(step, names)
    _check_order(blocks, names)
    notes: list[str] = []
    linears = _plan_linears(blocks, names, widths, notes)
    plan_tables = _plan_tables(tables, checkpoint, notes)
    left = tuple(n for n in names if n not in linears)
    if blocks and left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        notes.append(f"left in 16 bits: {shown}")
    rewrites = tuple(s for s in blocks if s.rewrites)
    return Plan(rewrites, linears, plan_tables, left, tuple(notes))


def _check_patterns(step: BlockMethod, names: list[str]) -> None:
    lists = {k: v for k, v in step if k in ("skip", "only", "token")}
    for parameter, patterns in lists.items():
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in names):
                raise ParameterError(
                    f"{step.name()}: {parameter} pattern '{pattern}' matches no linear",
                    f"Names look like {names[-1]}; * stands for anything",
                )
    if not any(step.touches(name) for name in names):
        raise RecipeError(f"{step.name()} is left with no linear to work on", "Loosen skip or only")


def _check_order(blocks: list[BlockMethod], names: list[str]) -> None:
    for later, step in enumerate(blocks):
        for earlier in blocks[:later]:
            shared = next((n for n in names if step.touches(n) and earlier.touches(n)), None)
            if step.rewrites and earlier.rewrites and shared:
                raise RecipeError(
                    f"{step.name()} after {earlier.name()}: both scale the input of {shared}",
                    "Keep one, or give them different linears with only and skip",
                )
            if step.rewrites and earlier.solves == "step":
                raise RecipeError(
                    f"{step.name()} after {earlier.name()}: a smoothing step after rounding would scale rounded weights",
                    f"Put {step.name()} before {earlier.name()}",
                )
            if step.solves == "step" and earlier.solves == "step" and shared:
                raise RecipeError(
                    f"{step.name()} after {earlier.name()}: {shared} would be rounded twice",
                    "Keep one, or give them different linears with only and skip",
                )


def _plan_linears(
    blocks: list[BlockMethod], names: list[str], widths: dict[str, int], notes: list[str]
) -> dict[str, LinearPlan]:
    solver: dict[str, BlockMethod] = {}
    activations: dict[str, ActivationScheme] = {}
    for step in blocks:
        for name in filter(step.touches, names):
            if step.solves != "no":
                solver[name] = (
                    step  # a later "step" replaces an earlier "default"; _check_order saw to the rest
                )
            rounded = step.activations(name)
            if rounded is not None:
                activations[name] = rounded
    schemes: dict[int, WeightScheme] = {}
    for step in blocks:
        mine = {n: widths[n] for n in names if solver.get(n) is step}
        scheme = step.weights(mine) if mine else None
        if scheme is None:
            continue
        schemes[id(step)] = scheme
        _note_group_size(step, scheme, mine, notes)
    return {
        name: LinearPlan(_linear_scheme(schemes[id(s)], activations.get(name)), s)
        for name in names
        if (s := solver.get(name)) is not None and id(s) in schemes
    }


def _linear_scheme(weights: WeightScheme, activations: ActivationScheme | None) -> LinearScheme:
    """Join both halves; integer engines multiply by the scales of W8A8 in float32, so they are stored so."""
    if activations is not None and weights.bits == 8:
        weights = weights.model_copy(update={"scale_dtype": "float32"})
    return LinearScheme(weights=weights, activations=activations)


def _note_group_size(step: Method, scheme: WeightScheme, widths: dict[str, int], notes: list[str]) -> None:
    default = getattr(step, "group_size", 0) is None and scheme.group_size not in (None, GROUP_SIZES[0])
    if default:
        name, width = next((n, w) for n, w in widths.items() if w % GROUP_SIZES[0])
        notes.append(
            f"{step.name()}: group_size {scheme.group_size}, as {name} has {width} inputs, no multiple of {GROUP_SIZES[0]}"
        )


def _plan_tables(tables: list[TableMethod], checkpoint: Checkpoint, notes: list[str]) -> dict[str, TablePlan]:
    if len(tables) > 1:
        raise RecipeError(f"{tables[1].name()} stands twice in the recipe", "Keep one")
    if not tables:
        return {}
    family, stored = checkpoint.family, set(checkpoint.names())
    names = [n for n in (family.embedding, family.head) if f"{n}.weight" in stored]
    widths = {n: checkpoint.shape(f"{n}.weight")[1] for n in names}
    scheme = tables[0].weights(widths)
    _note_group_size(tables[0], scheme, widths, notes)
    return {name: TablePlan(scheme, tables[0]) for name in names}
