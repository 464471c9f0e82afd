"""What it means for a recipe that some steps rewrite the whole model first, or have inputs rotated at run time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from frugallm.compress.contract import PrepareMethod
from frugallm.compress.quantize.hadamard import Rotation, hadamard_rotation
from frugallm.errors import RecipeError
from frugallm.formats.quantized_tensor import LinearScheme
from frugallm.method import Method

if TYPE_CHECKING:
    from frugallm.compress.plan import LinearPlan
    from frugallm.models.checkpoint import Checkpoint


def prepared(steps: Iterable[Method], checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """Return what the recipe's other steps begin with: the model as those that rewrite all of it leave it."""
    for step in steps:
        if isinstance(step, PrepareMethod):
            checkpoint = step.prepare(checkpoint, seed)
    return checkpoint


def check_first(steps: Sequence[Method]) -> list[PrepareMethod]:
    """Return the steps that rewrite the whole model: one of each kind, before all others."""
    found: list[PrepareMethod] = []
    for number, step in enumerate(steps):
        if not isinstance(step, PrepareMethod):
            continue
        if number > len(found):
            raise RecipeError(
                f"{step.name()} after {steps[number - 1].name()}: it rewrites the whole model, before any other step",
                "Put it first",
            )
        if any(type(step) is type(earlier) for earlier in found):
            raise RecipeError(f"{step.name()} stands twice in the recipe", "Keep one")
        found.append(step)
    return found


def rotate_inputs(
    step: PrepareMethod, checkpoint: Checkpoint, linears: dict[str, LinearPlan], pruned: Collection[str]
) -> None:
    """Let the inputs that ``step`` names be rotated before they are rounded, and their weights be stored in that basis."""
    rounded = {name for name, plan in linears.items() if plan.scheme.activations is not None}
    for name, order in step.rotations(checkpoint, rounded).items():
        plan = linears.get(name)
        if plan is None or order == 1:
            continue
        if name in pruned:
            raise RecipeError(
                f"{step.name()}: in the basis of rotated inputs the zeros of {name} are none",
                f"Prune other linears, or {step.name()}:online=never",
            )
        inputs, weights = plan.scheme.activations, plan.scheme.weights
        weights = weights.model_copy(update={"extras": (*weights.extras, "rotation")})
        inputs = inputs and inputs.model_copy(update={"rotation": order})
        linears[name] = replace(
            plan, scheme=LinearScheme(weights=weights, activations=inputs), rotation=order
        )


def rotation_of(linears: Mapping[str, LinearPlan], names: Iterable[str]) -> Rotation | None:
    """Return the basis in which an input, read by the linears ``names``, is rounded, and their weights are solved."""
    orders = {linears[name].rotation for name in names if name in linears}
    assert len(orders) <= 1, "an input is rotated for some of its linears only"
    order = orders.pop() if orders else None
    return None if order is None else hadamard_rotation(order)
