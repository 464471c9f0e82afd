"""Which steps of a recipe may come after which, and on which linears; and what they must find there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from frugallm.compress.contract import BlockMethod, matches
from frugallm.errors import ParameterError, RecipeError
from frugallm.walk.statistics import PAIRED

if TYPE_CHECKING:
    from frugallm.compress.plan import Plan
    from frugallm.models.checkpoint import Checkpoint


def check_patterns(step: BlockMethod, names: list[str]) -> None:
    """Refuse name patterns of a step that match no linear (full names), and a step that is left with none."""
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


def check_order(blocks: list[BlockMethod], names: list[str]) -> None:
    """Refuse steps that make no sense one after the other, with the reason and the mend."""
    for later, step in enumerate(blocks):
        for earlier in blocks[:later]:
            shared = next((n for n in names if step.touches(n) and earlier.touches(n)), None)
            conflict = _conflict(step, earlier, shared)
            if conflict is not None:
                reason, mend = conflict
                raise RecipeError(f"{step.name()} after {earlier.name()}: {reason}", mend)


def _conflict(step: BlockMethod, earlier: BlockMethod, shared: str | None) -> tuple[str, str] | None:
    """Return why ``step`` cannot come after ``earlier`` and the mend; ``shared`` is a linear of both, if there is one."""
    rounds, rounded = step.rounds, earlier.rounds and earlier.solves == "step"
    keep_one = "Keep one, or give them different linears with only and skip"
    swap = f"Put {step.name()} before {earlier.name()}"
    if step.rewrites and earlier.rewrites and shared:
        return f"both scale the input of {shared}", keep_one
    if step.rewrites and rounded:
        return "a smoothing step after rounding would scale rounded weights", swap
    if step.rewrites and earlier.prunes:
        return "a smoothing step after pruning would change what the zeros were chosen by", swap
    if shared and rounds and rounded and step.solves == "step":
        return f"{shared} would be rounded twice", keep_one
    if shared and rounds and earlier.repairs and step.solves == "step":
        return f"what {earlier.name()} adds makes up for the rounding of {shared}, which is done later", swap
    if shared and rounds and earlier.prunes and not step.keeps_zeros:
        return f"it stores {shared} in another basis, where its zeros are none", keep_one
    if (
        shared
        and earlier.reconstructs
        and (step.prunes or step.repairs or (rounds and step.solves == "step" and not earlier.chooses))
    ):
        return f"what {earlier.name()} trains in {shared} would be changed again", swap
    if step.rewrites and earlier.reconstructs:
        return "a smoothing step would change what is trained", swap
    if shared and step.repairs and earlier.prunes:
        return f"what it adds would fill the zeros of {shared}", keep_one
    if shared and step.chooses and rounded:
        return f"how {shared} is stored must be known before it is rounded", swap
    if shared and step.chooses and type(step) is type(earlier):
        return f"both choose how {shared} is stored", keep_one
    if shared and step.prunes and earlier.prunes:
        return f"{shared} would be pruned twice", keep_one
    if shared and step.prunes and rounded:
        return f"{shared} is rounded by then, and its zeros would be chosen among rounded weights", swap
    return None


def check_training(plan: Plan) -> None:
    """Refuse a step that trains blocks where there is nothing to train, or nothing between codes."""
    for step in plan.reconstructions:
        for name, linear in plan.linears.items():
            grid = linear.scheme.weights.grid
            if step.touches(name) and grid == "olive":
                raise RecipeError(
                    f"{step.name()} trains weights between codes, and there is nothing between pairs, as in {name}",
                    "Use a step that rounds to numbers, or skip those linears",
                )
        if not any(step.touches(name) for name in plan.linears):
            raise RecipeError(
                f"{step.name()} finds no rounded linear to train", "Put a step that rounds before it"
            )


def check_comparing(plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse statistics that compare both models where these send other tokens to an expert."""
    for index in range(checkpoint.config.num_hidden_layers if plan.reads_original else 0):
        for sub in checkpoint.family.graph(checkpoint.config, index):
            for site in sub.outputs if sub.routed else ():
                name = f"{checkpoint.family.block(index)}.{site.name}"
                work = plan.work(name)
                if work is not None and work.needs & PAIRED.keys():
                    raise RecipeError(
                        f"{work.steps[-1].name()} compares inputs with those of the original model, which sends other "
                        f"tokens to the expert of {name}",
                        f"Skip *.{site.name.rpartition('.')[2]} there, or use another step for them",
                    )
