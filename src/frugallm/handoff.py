"""Where the result of a method loads: asked of the table of engines, and written down for no method.

The method is planned on a small model of which only the shapes exist, and ``engines.yaml`` is asked what it says about
such a plan. Methods that act while a model is trained say how they store a small one that they have not trained. Those
that act while a model answers have no result; they say for which models they do so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from frugallm.errors import FrugalError
from frugallm.formats.engines import RESULTS, Seen, Support, engines_for, exports_for, table
from frugallm.inference.contract import InferenceMethod
from frugallm.method import Method

if TYPE_CHECKING:
    from frugallm.compress.plan import Plan
    from frugallm.models.checkpoint import Checkpoint
    from frugallm.training.contract import TrainMethod

HERE = "frugallm.load"
ENGINE = "frugallm.LLM"
CHOSEN_LATER = "How each linear is stored is chosen when the work begins; the run says which engines load that no longer."
MEANING = "*tested*: loaded and compared by FrugalLM itself; *documented*: by the engine's documentation, not run here."


@dataclass(frozen=True)
class Place:
    """One program that may load a result, or one format that may be written from it.

    Attributes
    ----------
    name
        ``vLLM on CUDA``, or what to type.
    seen
        How it is known that it does: tested, documented, or no.
    note
        Versions, conditions, or the reason why not.
    """

    name: str
    seen: Seen
    note: str = ""


def places(step: Method) -> list[Place]:
    """Return where the result of a recipe of this one step loads, on a Llama.

    Raises
    ------
    FrugalError
        If the step has no result by itself.
    """
    if isinstance(step, InferenceMethod):
        return [_answered(step)]
    format, plan = _stored(step)
    direct = table_rows(format, plan)
    engines = [_place(engine, device, direct) for engine, device in _engines(direct)]
    here = Place(HERE, "tested", "" if plan is not None else f"reads the layout {format}")
    return [*engines, here, *([] if plan is None else _exports(plan))]


def _answered(step: InferenceMethod) -> Place:
    """Return for which models, by the ``model_type`` of their usual configuration, the engine answers with this step."""
    from transformers import CONFIG_MAPPING

    from frugallm.models.family import FAMILIES

    kinds = [
        kind for family in FAMILIES for kind in family.model_types if not step.why_not(CONFIG_MAPPING[kind]())
    ]
    return Place(ENGINE, "tested", f"with native kernels; models of type {', '.join(kinds)}")


def changes(method: type[Method]) -> dict[str, list[str]]:
    """Return what other choices of single parameters mean for engines: sentence to parameters, as ``bits=3``.

    Numbers are left aside, and so are choices that do not stand by themselves.
    """
    usual = _answers(method())
    found: dict[str, list[str]] = {}
    for name, value in _choices(method):
        try:
            other = _answers(method(**{name: value}))
        except FrugalError:
            continue
        differ = [f"{place} {seen}" for place, seen in other.items() if usual.get(place, "no") != seen]
        if differ:
            found.setdefault(", ".join(differ), []).append(f"{name}={_written(value)}")
    return found


def table_rows(format: str, plan: Plan | None) -> list[Support]:
    """Return the rows about a result as it is: by its plan, or else by the format that it is in."""
    return [row for row in table() if row.format == format] if plan is None else engines_for(plan)


def _answers(step: Method) -> dict[str, Seen]:
    format, plan = _stored(step)
    rows = table_rows(format, plan)
    return {place.name: place.seen for place in (_place(*key, rows) for key in _engines(rows))}


def _choices(method: type[Method]) -> Iterator[tuple[str, Any]]:
    for name, field in method.model_fields.items():
        annotation, default = field.annotation, field.get_default(call_default_factory=True)
        values: tuple[Any, ...] = (False, True) if annotation is bool else ()
        for kind in (annotation, *get_args(annotation)):
            values += get_args(kind) if get_origin(kind) is Literal else ()
        yield from ((name, value) for value in dict.fromkeys(values) if value != default)


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- how a step stores a model -----------------------------------------------------------------------------------------


@cache
def _example() -> Checkpoint:
    """Return a small Llama without weights; its widths are multiples of 128, as those of most models are."""
    import torch
    from transformers import AutoModelForCausalLM

    from frugallm.models.in_memory import InMemory
    from frugallm.training.students import new_config

    with torch.device("meta"):
        return InMemory(AutoModelForCausalLM.from_config(new_config("tiny", {"num_hidden_layers": 1})))


def _stored(step: Method) -> tuple[str, Plan | None]:
    """Return the format of the step's result, and the plan where it is that of results."""
    from frugallm.compress.plan import make_plan
    from frugallm.compress.prepare import prepared
    from frugallm.training.contract import TrainMethod

    if isinstance(step, TrainMethod):
        return _trained(step)
    return RESULTS, make_plan([step], prepared([step], _example(), 0))


def _trained(step: TrainMethod) -> tuple[str, Plan | None]:
    import torch

    from frugallm.training.layouts import dense
    from frugallm.training.students import new_model

    family = _example().family
    student = new_model(_example().config, 0)
    step.rewrite(student, family)
    layout = step.hand_on(student, family, torch.bfloat16) or dense(torch.bfloat16)
    method = (layout.quantization or {}).get("quant_method", RESULTS)
    return str(method), layout.plan


def chosen_later(step: Method) -> bool:
    """Whether how linears are stored is known only when the work begins."""
    plan = _stored(step)[1]
    return plan is not None and bool(plan.choosers)


# -- what the table says -----------------------------------------------------------------------------------------------


def _engines(rows: Iterable[Support]) -> list[tuple[str, str]]:
    """Return the engines and devices that load results of some kind, and those of ``rows``; one that loads none is left out."""
    known = [row for row in table() if row.format == RESULTS and row.weights]
    said = [(row.engine, row.device) for row in rows if row.weights and row.format != RESULTS]
    replaced = {engine for engine, _ in said}
    usual = ((row.engine, row.device) for row in known if row.engine not in replaced)
    return list(dict.fromkeys((*said, *usual)))


def _place(engine: str, device: str, rows: Iterable[Support]) -> Place:
    name = _name(engine, device)
    mine = [row for row in rows if (row.engine, row.device) == (engine, device)]
    row = next((row for row in mine if row.seen != "no"), mine[0] if mine else None)
    if row is None:
        return Place(name, "no")
    return Place(name, row.seen, row.note if row.seen == "no" else _words(row))


def _name(engine: str, device: str) -> str:
    return engine if device == "any" else f"{engine} on {'a ' if device == 'CPU' else ''}{device}"


def _words(row: Support) -> str:
    return "; ".join(filter(None, (row.version, row.note)))


def _exports(plan: Plan) -> Iterator[Place]:
    """Yield what ``frugal export`` can write and who loads that; what it cannot write comes last, in one place."""
    from frugallm.formats.export import FORMATS

    refused = []
    rounded = any(linear.scheme.activations is not None for linear in plan.linears.values())
    for name, format in FORMATS.items():
        if name == RESULTS or not (
            plan.quantizes or format.suffix
        ):  # what is dense already is written as a file only
            continue
        lost = rounded and not format.rounds_inputs
        rows = _readers(name, _weights_alone(plan) if lost else plan)
        if not rows:
            refused.append(name)
            continue
        seen: Seen = "tested" if any(row.seen == "tested" for row in rows) else "documented"
        # An engine may have several rows, one for each form of inputs.
        readers = ", ".join(dict.fromkeys(f"{_name(row.engine, row.device)} ({row.seen})" for row in rows))
        command = f"frugal export --to {name}{':TYPE' if format.kinds() else ''}"
        yield Place(command, seen, f"{readers}; inputs are no longer rounded there" if lost else readers)
    if refused:
        yield Place(f"frugal export --to {', '.join(refused)}", "no", "the format cannot say it")


def _readers(format: str, plan: Plan) -> list[Support]:
    """Return the rows of engines that load an export: of a dense copy, those that load any dense folder."""
    if format == "dense":
        return [row for row in engines_for(replace(plan, linears={}, tables={})) if row.seen != "no"]
    return exports_for(plan, format)


def _weights_alone(plan: Plan) -> Plan:
    linears = {
        name: replace(linear, scheme=linear.scheme.model_copy(update={"activations": None}))
        for name, linear in plan.linears.items()
    }
    return replace(plan, linears=linears)
