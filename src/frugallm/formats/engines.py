"""Which engine loads what: one data table, ``engines.yaml``, and what follows from it."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

from frugallm.compress.plan import Modules, Plan
from frugallm.formats.quantized_tensor import ActivationScheme, WeightScheme

Seen = Literal["tested", "documented", "no"]
Inputs = Literal["none", "token", "static", "outliers", "clusters", "fp8 token", "fp8 static", "olive"]
Grid = Literal["symmetric", "asymmetric", "float zero", "extras", "mxfp4", "nvfp4", "fp4", "fp8", "olive"]


#: The format of results, unless a row says another one.
RESULTS = "compressed-tensors"
#: FP4 formats that have a name, by the type of their scales. Engines have kernels for groups of 32 and of 16.
_FP4: dict[str, Grid] = {"float8_e8m0fnu": "mxfp4", "float8_e4m3fn": "nvfp4"}


class Support(BaseModel):
    """One row of the table: an engine on a device, and the schemes it loads in a format."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    format: str = RESULTS
    version: str
    device: str
    weights: tuple[int, ...]
    inputs: tuple[Inputs, ...]
    input_bits: tuple[int, ...] = (4, 5, 6, 7, 8)
    tables: tuple[int, ...]
    grids: tuple[Grid, ...] = ("symmetric", "asymmetric")
    modules: tuple[Modules, ...] = ("Linear",)
    groups: tuple[int, ...] = ()
    seen: Seen
    note: str = ""


@cache
def table() -> tuple[Support, ...]:
    """Return all rows."""
    text = resources.files("frugallm.formats").joinpath("engines.yaml").read_text(encoding="utf-8")
    return tuple(Support(**row) for row in yaml.safe_load(text))


def schemes(plan: Plan) -> tuple[set[int], set[Inputs], set[int]]:
    """Return the bits of weights, the kinds of inputs and the bits of tables that a plan stores; 16: not quantized."""
    weights: set[int] = set()
    inputs: set[Inputs] = set()
    for linear in plan.linears.values():
        weights.add(linear.scheme.weights.bits)
        inputs.add(_kind(linear.scheme.activations))
    return weights or {16}, inputs, {t.scheme.bits for t in plan.tables.values()} or {16}


def _kind(rounded: ActivationScheme | None) -> Inputs:
    if rounded is None:
        return "none"
    if rounded.outliers is not None:
        return "outliers"
    if rounded.clusters is not None:
        return "clusters"
    if rounded.grid == "olive":
        return "olive"
    if rounded.grid == "e4m3":
        return "fp8 token" if rounded.dynamic else "fp8 static"
    return "token" if rounded.dynamic else "static"


def input_bits(plan: Plan) -> set[int]:
    """Return the bits of rounded inputs."""
    schemes = (linear.scheme.activations for linear in plan.linears.values())
    return {rounded.bits for rounded in schemes if rounded is not None}


def grids(plan: Plan) -> set[Grid]:
    """Return the kinds of grids on which a plan stores weights; where some have extras, nothing else decides."""
    found = {_grid(linear.scheme.weights) for linear in plan.linears.values()}
    return {"extras"} if "extras" in found else found


def groups(plan: Plan) -> set[int]:
    """Return the sizes of the groups in which a plan stores weights; 0: whole rows."""
    return {linear.scheme.weights.group_size or 0 for linear in plan.linears.values()}


def _grid(weights: WeightScheme) -> Grid:
    if weights.extras or weights.second is not None:
        return "extras"
    if weights.grid == "olive":
        return "olive"
    if weights.grid == "e4m3":
        return "fp8"
    if weights.grid == "e2m1":
        return _FP4.get(weights.scale_dtype, "fp4") if weights.group_size else "fp4"
    if weights.symmetric:
        return "symmetric"
    return "asymmetric" if weights.zero_dtype == "int8" else "float zero"


def covers(row: Support, plan: Plan) -> bool:
    """Whether a row speaks of linears as a plan stores them; its format and tables are left aside."""
    weights, inputs, _ = schemes(plan)
    return (
        weights <= set(row.weights)
        and inputs <= set(row.inputs)
        and input_bits(plan) <= set(row.input_bits)
        and grids(plan) <= set(row.grids)
        and plan.modules in row.modules
        and (not row.groups or groups(plan) <= set(row.groups))
    )


def engines_for(plan: Plan) -> list[Support]:
    """Return the rows that say something about results of this plan, engines that refuse it included."""
    tables = schemes(plan)[2]
    rows = [r for r in table() if r.format == RESULTS and tables <= set(r.tables) and covers(r, plan)]
    known = {(r.engine, r.device) for r in rows}
    refusals = [r for r in table() if r.seen == "no" and not r.weights and (r.engine, r.device) not in known]
    return rows + refusals


def exports_for(plan: Plan, format: str) -> list[Support]:
    """Return the rows of engines that load what ``frugal export`` writes in another format; it writes tables out."""
    return [r for r in table() if r.format == format and r.seen != "no" and covers(r, plan)]


def loads_in_transformers(plan: Plan) -> bool:
    """Whether plain transformers loads the result the default way."""
    return any(row.engine == "transformers" and row.seen != "no" for row in engines_for(plan))


def readers_of(format: str) -> list[str]:
    """Return a line for each engine that reads a format that results are exported to."""
    return [
        f"{row.engine} {row.version} on {row.device}: {', '.join(map(str, row.weights))} bits, "
        f"{' and '.join(row.grids)} ({row.seen}{'; ' + row.note if row.note else ''})"
        for row in table()
        if row.format == format and row.seen != "no"
    ]
