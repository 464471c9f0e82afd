"""What every method that works on the embedding and the head must pass, on two small random models."""

from __future__ import annotations

import math

import torch

from frugallm.compress.contract import TableMethod
from frugallm.conformance import parts
from frugallm.conformance.block_methods import (
    a_killed_run_continues_to_the_same_bytes,
    inputs_and_settings_stay_as_they_were,
    missing_text_is_refused_before_any_work,
    shapes_stay_on_every_model,
    two_runs_are_equal_byte_for_byte,
)
from frugallm.conformance.examples import variants
from frugallm.conformance.outcome import Check, CheckFailed, ensure
from frugallm.conformance.stored_models import claimed_bytes, file_bytes, loads_where_the_table_says
from frugallm.conformance.trial import KINDS, Trial, windows
from frugallm.method import Method

#: Largest relative error of a table in 8 bits.
EIGHT_BIT_ERROR = 0.02


def checks(method: type[Method]) -> list[Check]:
    """Return the checks that apply to a table method."""
    return [
        shapes_stay_on_every_model,
        two_runs_are_equal_byte_for_byte,
        inputs_and_settings_stay_as_they_were,
        a_killed_run_continues_to_the_same_bytes,
        missing_text_is_refused_before_any_work,
        tied_stays_tied,
        rows_are_independent,
        blocks_stay_as_they_are,
        table_errors_are_finite_and_small_at_8_bits,
        every_parameter_value_stores_and_loads,
    ]


def tied_stays_tied(trial: Trial) -> None:
    """A tied table is stored once, and the loaded model shares it; an untied head is stored beside it."""
    for kind in KINDS:
        run = trial.run(kind)
        family, tensors = run.job.checkpoint.family, run.tensors()
        codes = [
            n
            for n in tensors
            if n.startswith(f"{family.head}.") and tensors[n].dtype in (torch.int8, torch.int32)
        ]
        stored = run.place.stored(run.job)
        if kind == "tied":
            ensure(not codes, f"the tied head is stored a second time ({', '.join(codes)})")
            ensure(
                list(run.job.plan.tables) == [family.embedding],
                "the tied head is planned as a table of its own",
            )
        else:
            ensure(bool(codes), "the untied head is not compressed")
            same = torch.equal(
                stored.tensor(f"{family.head}.weight"), stored.tensor(f"{family.embedding}.weight")
            )
            ensure(not same, "the untied head is stored as the embedding")


def rows_are_independent(trial: Trial) -> None:
    """Rows are solved in chunks, so none may depend on another; the rows given stay as they were."""
    for parameters in ({}, *({name: value} for name, value in variants(trial.method))):
        if not trial.accepts(**parameters):
            continue
        step = trial.method(**parameters)
        assert isinstance(step, TableMethod)
        scheme = step.weights({"table": 96})
        rows, _ = parts.example(65, 96, frozenset())
        before = rows.clone()
        whole = step.solve(rows, scheme)
        pieces = [step.solve(rows[i : i + 13], scheme) for i in range(0, 65, 13)]
        ensure(torch.equal(rows, before), "solve changes the rows that it was given")
        for leaf in ("codes", "scale"):
            same = torch.equal(torch.cat([getattr(p, leaf) for p in pieces]), getattr(whole, leaf))
            ensure(same, f"{leaf} of rows solved in chunks differ from those of the whole table")
        ensure(whole.zero is None, "a table has no zero points in any container")


def blocks_stay_as_they_are(trial: Trial) -> None:
    """Everything but the tables is stored as it came, in the uncompressed type."""
    run = trial.run()
    tensors, checkpoint = run.tensors(), run.job.checkpoint
    for name in checkpoint.names():
        if name.removesuffix(".weight") not in run.job.plan.tables:
            ensure(
                torch.equal(tensors[name], checkpoint.tensor(name).to(run.job.stored)), f"{name} is changed"
            )


def table_errors_are_finite_and_small_at_8_bits(trial: Trial) -> None:
    """The table's error is a number below one, and close to nothing at 8 bits."""
    for kind in KINDS:
        run = trial.run(kind)
        stored, before = run.place.stored(run.job), run.job.checkpoint
        for path, table in run.job.plan.tables.items():
            name = f"{path}.weight"
            weight = before.tensor(name).float()
            error = float((stored.tensor(name) - weight).norm() / weight.norm())
            limit = EIGHT_BIT_ERROR if table.scheme.bits == 8 else 1.0
            ensure(
                math.isfinite(error) and error <= limit,
                f"{name}: error {error:.3g} at {table.scheme.bits} bits",
            )


def every_parameter_value_stores_and_loads(trial: Trial) -> None:
    """Defaults and each parameter at other values: the bytes claimed, and equal logits after loading."""
    for parameters in ({}, *({name: value} for name, value in variants(trial.method))):
        if not trial.accepts(**parameters):
            continue
        for kind in KINDS:
            run = trial.run(kind, **parameters)
            claimed, found = claimed_bytes(run), file_bytes(run)
            ensure(
                claimed == found,
                f"{parameters} on the {kind} model: {found} bytes, the scheme says {claimed}",
            )
            try:
                loads_where_the_table_says(run, windows(kind))
            except CheckFailed as error:
                raise CheckFailed(f"{parameters} on the {kind} model: {error}") from error
