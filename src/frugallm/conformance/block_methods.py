"""What every method that works on decoder blocks must pass, on two small random models.

A run here is the job that ``frugal run`` does, up to the folder that would be handed out.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from frugallm.compress.contract import BlockMethod
from frugallm.compress.prune.unstructured.masks import Sparsity
from frugallm.conformance import parts
from frugallm.conformance.examples import variants
from frugallm.conformance.outcome import Check, CheckFailed, ensure
from frugallm.conformance.stored_models import (
    claimed_bytes,
    file_bytes,
    loads_outside_as_in_memory,
    loads_where_the_table_says,
)
from frugallm.conformance.trial import BLOCKS, KINDS, Run, Trial, carry_out, job_for, random_model, windows
from frugallm.errors import FrugalError
from frugallm.formats.engines import loads_in_transformers
from frugallm.formats.quantized_tensor import WeightScheme
from frugallm.job import Workplace, compress, layer_facts, needs_text
from frugallm.method import Method
from frugallm.models.in_memory import InMemory
from frugallm.progress import Progress

#: Largest relative error of a weight in 8 bits.
EIGHT_BIT_ERROR = 0.03
#: Widths on which solvers are tried.
WIDTH = 96


class Killed(Exception):
    """Stands for the end of a process in the middle of its work."""


class KilledAfter(Progress):
    """A progress that ends the work after some blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks

    def event(self, kind: str, **facts: Any) -> None:
        """Raise when the last block is reported."""
        if kind == "block" and facts["index"] == self.blocks:
            raise Killed


def checks(method: type[Method]) -> list[Check]:
    """Return the checks that apply to a block method, by the verbs that it has."""
    assert issubclass(method, BlockMethod)
    step = method()
    found: list[Check] = [
        shapes_stay_on_every_model,
        two_runs_are_equal_byte_for_byte,
        inputs_and_settings_stay_as_they_were,
        errors_are_finite_and_small_at_8_bits,
        bytes_on_disk_are_the_bytes_claimed,
        the_folder_loads_without_us_to_equal_logits,
        every_parameter_value_stores_and_loads,
        a_killed_run_continues_to_the_same_bytes,
        missing_text_is_refused_before_any_work,
        skipped_linears_stay_as_they_are,
    ]
    if method.rewrite is not BlockMethod.rewrite:
        found.append(a_rewrite_keeps_the_logits)
    if method.solve is not BlockMethod.solve:
        found.append(a_solver_leaves_its_inputs_alone)
        if not step.prunes and method.keeps_zeros:  # what prunes itself comes after no step that prunes
            found.append(a_solver_keeps_the_zeros_of_an_earlier_step)
        if method.by_rows:
            found.append(a_solver_treats_rows_alike)
        if "second_moment" in method.solve_needs:
            found.append(a_solver_is_no_worse_than_nearest)
    if method.repair is not BlockMethod.repair:
        found += [a_repair_comes_closer, a_repair_makes_up_for_any_rounding]
    if method.schemes is not BlockMethod.schemes:
        found.append(a_later_step_rounds_as_was_chosen)
    if method.reconstruct is not BlockMethod.reconstruct:
        found.append(a_reconstruction_never_loses)
    if method.prune is not BlockMethod.prune:
        found += [a_pruner_zeroes_what_it_says, zeros_are_in_the_folder]
        if not step.rounds:  # what rounds itself comes before no step that rounds
            found.append(zeros_stay_when_a_later_step_rounds)
        if method.by_rows:
            found.append(a_pruner_treats_rows_alike)
        if "second_moment" in method.solve_needs:
            found.append(a_pruner_is_no_worse_than_its_zeros)
    return found


def shapes_stay_on_every_model(trial: Trial) -> None:
    """Every tensor keeps its shape: tied and untied, grouped heads, odd widths, biases, both types."""
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            run = trial.run(kind, dtype)
            stored, before = run.place.stored(run.job), run.job.checkpoint
            for name in before.names():
                same = stored.tensor(name).shape == before.shape(name)
                ensure(same, f"{name} of the {kind} {dtype} model has another shape")


def two_runs_are_equal_byte_for_byte(trial: Trial) -> None:
    """The same recipe, model, text and seed give the same folder."""
    for kind in KINDS:
        again = carry_out(trial.job(kind), trial.out())
        ensure(again.digest() == trial.run(kind).digest(), f"two runs on the {kind} model differ")


def inputs_and_settings_stay_as_they_were(trial: Trial) -> None:
    """A run changes neither the weights that it was given, nor the text, nor its own parameters."""
    model, tokens = random_model("tied"), windows("tied").clone()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = trial.method()
    settings, number = step.settings(), hash(step)
    carry_out(job_for(InMemory(model), [step], tokens), trial.out())
    for name, tensor in model.state_dict().items():
        ensure(torch.equal(tensor, weights[name]), f"a run changes {name} of the model that it was given")
    ensure(torch.equal(tokens, windows("tied")), "a run changes its text")
    ensure(step.settings() == settings and hash(step) == number, "a run changes its parameters")
    ensure(vars(step).keys() == type(step).model_fields.keys(), "a run leaves something on the instance")


def errors_are_finite_and_small_at_8_bits(trial: Trial) -> None:
    """Every linear's error is a number below one, and close to nothing at 8 bits where nothing is pruned."""
    chosen: list[dict[str, Any]] = [{}]
    if any(name == "bits" and value == 8 for name, value in variants(trial.method)):
        chosen.append({"bits": 8})
    for parameters in chosen:
        run = trial.run(**parameters)
        for layer in layer_facts(run.job, run.place):
            work = run.job.plan.work(layer["name"])
            assert work is not None
            exact = work.pruned is None and work.rounded is not None and work.rounded.scheme.weights.bits == 8
            for fact in ("weight_error", "error"):
                error = layer.get(fact, 0.0)
                good = math.isfinite(error) and error <= (EIGHT_BIT_ERROR if exact else 1.0)
                ensure(good, f"{layer['name']}: {fact} {error:.3g} with {work.label()}")


def bytes_on_disk_are_the_bytes_claimed(trial: Trial) -> None:
    """Codes, scales and zero points take what the scheme says, and everything else two bytes a number."""
    for kind in KINDS:
        run = trial.run(kind)
        claimed, found = claimed_bytes(run), file_bytes(run)
        ensure(claimed == found, f"the {kind} model takes {found} bytes, the scheme says {claimed}")


def the_folder_loads_without_us_to_equal_logits(trial: Trial) -> None:
    """Plain transformers with compressed-tensors computes what the stored values say."""
    for kind in KINDS:
        loads_outside_as_in_memory(trial.run(kind), windows(kind))


def every_parameter_value_stores_and_loads(trial: Trial) -> None:
    """Each parameter at other values than its default: the bytes claimed, and equal logits after loading.

    With the defaults as well, where loading without us is not checked by itself.
    """
    for kind in KINDS:
        if not loads_in_transformers(trial.run(kind).job.plan):
            loads_where_the_table_says(trial.run(kind), windows(kind))
    for number, (name, value) in enumerate(variants(trial.method)):
        if not trial.accepts(**{name: value}):
            continue  # legal alone, but not with these models or the other parameters
        kind = KINDS[number % len(KINDS)]
        run = trial.run(kind, **{name: value})
        what = f"{name}={value!r} on the {kind} model"
        claimed, found = claimed_bytes(run), file_bytes(run)
        ensure(claimed == found, f"{what}: {found} bytes on disk, the scheme says {claimed}")
        try:
            loads_where_the_table_says(run, windows(kind))
        except CheckFailed as error:
            raise CheckFailed(f"{what}: {error}") from error


def a_killed_run_continues_to_the_same_bytes(trial: Trial) -> None:
    """Killed after any block and continued, it is the run that was never killed."""
    for blocks in range(1, BLOCKS + 1):
        out = trial.out()
        try:
            carry_out(trial.job(), out, KilledAfter(blocks))
        except Killed:
            run = carry_out(trial.job(), out, resume=True)
        else:
            raise CheckFailed(f"block {blocks} is not reported")
        ensure(run.digest() == trial.run().digest(), f"killed after block {blocks}, it ends in other bytes")


def missing_text_is_refused_before_any_work(trial: Trial) -> None:
    """A method that reads text says so and writes nothing; one that does not works without."""
    job = job_for(InMemory(random_model("tied")), [trial.method()], None)
    place = Workplace(trial.out())
    place.path.mkdir(parents=True)
    try:
        compress(job, place, Progress())
    except FrugalError as error:
        ensure(needs_text(job.plan), f"it declares no need of text, and is refused without: {error}")
        ensure(not os.listdir(place.path), f"refused, but {os.listdir(place.path)} is written")
    else:
        ensure(not needs_text(job.plan), "it declares that it needs text, and runs without")


def skipped_linears_stay_as_they_are(trial: Trial) -> None:
    """What ``skip`` names is stored in 16 bits, and so is what ``only`` does not name."""
    patterns: tuple[dict[str, Any], ...] = ({"skip": ("*.self_attn.*",)}, {"only": ("*.mlp.*",)})
    for pattern in patterns:
        run = trial.run(**pattern)
        stored = run.tensors()
        for name in run.job.plan.left_alone:
            ensure(stored[f"{name}.weight"].dtype is run.job.stored, f"{pattern}: {name} is changed")
        left = {name.split(".")[-2] for name in run.job.plan.left_alone}
        solved = {name.split(".")[-2] for name in (*run.job.plan.linears, *run.job.plan.pruned)}
        ensure(left == {"self_attn"} and solved <= {"mlp"}, f"{pattern}: leaves {left}, changes {solved}")


def a_rewrite_keeps_the_logits(trial: Trial) -> None:
    """Before anything is rounded, the model's function is the same."""
    for kind in KINDS:
        scratch = trial.out()
        scratch.mkdir()
        parts.rewrite_keeps_the_logits(_step(trial), InMemory(random_model(kind)), windows(kind), scratch)


def _step(trial: Trial, **parameters: Any) -> BlockMethod:
    step = trial.method(**parameters)
    assert isinstance(step, BlockMethod)
    return step


def _on_every_grid(trial: Trial, check: Any) -> None:
    """Run a check ``check(step, scheme)`` of a solver with every value of every parameter that changes it."""
    for name, value in [("", None), *variants(trial.method)]:
        step = _step(trial, **({name: value} if name else {}))
        try:
            scheme = step.weights({"x.linear": WIDTH})
        except FrugalError:
            continue
        if scheme is None:
            continue
        try:
            check(step, scheme)
        except CheckFailed as error:
            raise CheckFailed(f"{name}={value!r}: {error}" if name else str(error)) from error


def _with_every_pattern(trial: Trial, check: Any) -> None:
    """Run a check ``check(step, zeros)`` with every value of every parameter with which the step only prunes."""
    for name, value in [("", None), *variants(trial.method)]:
        step = _step(trial, **({name: value} if name else {}))
        try:
            zeros = None if step.rounds else step.zeros({"x.linear": WIDTH})
        except FrugalError:
            continue
        if zeros is None:
            continue
        try:
            check(step, zeros)
        except CheckFailed as error:
            raise CheckFailed(f"{name}={value!r}: {error}" if name else str(error)) from error


def a_solver_leaves_its_inputs_alone(trial: Trial) -> None:
    """Solvers are functions: tensors in, codes on the grid out."""
    _on_every_grid(
        trial,
        lambda step, scheme: parts.solver_leaves_its_inputs_alone(
            step.solve, scheme, WIDTH, step.solve_needs
        ),
    )


def a_solver_treats_rows_alike(trial: Trial) -> None:
    """The walk solves linears that share an input as one weight, so rows must not see each other."""
    _on_every_grid(
        trial,
        lambda step, scheme: parts.solver_treats_rows_alike(step.solve, scheme, WIDTH, step.solve_needs),
    )


def a_solver_is_no_worse_than_nearest(trial: Trial) -> None:
    """Whoever reads the second moment must use it."""
    _on_every_grid(
        trial,
        lambda step, scheme: parts.solver_is_no_worse_than_nearest(
            step.solve, scheme, WIDTH, step.solve_needs, prunes=step.prunes
        ),
    )


def a_solver_keeps_the_zeros_of_an_earlier_step(trial: Trial) -> None:
    """What a step before has pruned stays pruned."""

    def check(step: BlockMethod, scheme: WeightScheme) -> None:
        if not step.prunes:
            parts.solver_keeps_zeros(step.solve, scheme, WIDTH, step.solve_needs)

    _on_every_grid(trial, check)


def a_repair_comes_closer(trial: Trial) -> None:
    """With what is stored beside the codes a weight, or its output, is closer to what it was."""
    for name, value in [("", None), *variants(trial.method)]:
        step = _step(trial, **({name: value} if name else {}))
        try:
            parts.repair_comes_closer(step, WIDTH)
        except CheckFailed as error:
            raise CheckFailed(f"{name}={value!r}: {error}" if name else str(error)) from error


def a_repair_makes_up_for_any_rounding(trial: Trial) -> None:
    """After another step that rounds, the same is stored beside its codes."""
    steps = [parts.Nearest(bits=3), trial.method()]
    run = carry_out(job_for(InMemory(random_model("tied")), steps, windows("tied")), trial.out())
    for name, plan in run.job.plan.linears.items():
        ensure(plan.solver is steps[0], f"{name} is rounded by {plan.solver.name()}, not by the step before")
        ensure(plan.scheme.weights.extras == _step(trial).adds, f"{name} is {plan.scheme.label()}")
    claimed, found = claimed_bytes(run), file_bytes(run)
    ensure(claimed == found, f"{found} bytes on disk, the scheme says {claimed}")
    loads_where_the_table_says(run, windows("tied"))


def a_later_step_rounds_as_was_chosen(trial: Trial) -> None:
    """A step that solves takes over the rounding, and not what was chosen."""
    alone = trial.run().job.plan
    job = job_for(InMemory(random_model("tied")), [trial.method(), parts.Nearest(bits=4)], windows("tied"))
    run = carry_out(job, trial.out())
    ensure(len(run.job.plan.linears) == len(alone.linears), "a later step rounds other linears")
    solvers = {plan.solver.name() for plan in run.job.plan.linears.values()}
    ensure(solvers == {parts.Nearest.name()}, f"rounded by {', '.join(sorted(solvers))}")
    ensure(claimed_bytes(run) == file_bytes(run), "what is stored is not what was chosen")
    loads_outside_as_in_memory(run, windows("tied"))


def a_reconstruction_never_loses(trial: Trial) -> None:
    """Trained, a block is as close to the original on windows that were held out as before, and some block is closer."""
    run = trial.run()
    errors = [(f["block_error"], f["block_error_before"]) for f in layer_facts(run.job, run.place)]
    worse = [pair for pair in errors if not pair[0] <= pair[1]]
    ensure(
        not worse, f"the error of a block rises from {worse[0][1]:.3g} to {worse[0][0]:.3g}" if worse else ""
    )
    ensure(any(after < before for after, before in errors), "no block comes closer to the original")


def a_pruner_zeroes_what_it_says(trial: Trial) -> None:
    """Pruners are functions: a tensor in, one with the claimed zeros out."""

    def check(step: BlockMethod, zeros: Sparsity) -> None:
        parts.pruner_zeroes_what_it_says(step.prune, zeros, WIDTH, step.solve_needs, by_rows=step.by_rows)

    _with_every_pattern(trial, check)


def a_pruner_treats_rows_alike(trial: Trial) -> None:
    """The walk prunes linears that share an input as one weight, so rows must not see each other."""
    _with_every_pattern(
        trial, lambda step, _: parts.pruner_treats_rows_alike(step.prune, WIDTH, step.solve_needs)
    )


def a_pruner_is_no_worse_than_its_zeros(trial: Trial) -> None:
    """Whoever reads the second moment must use it."""
    _with_every_pattern(
        trial, lambda step, _: parts.pruner_is_no_worse_than_its_zeros(step.prune, WIDTH, step.solve_needs)
    )


def zeros_are_in_the_folder(trial: Trial) -> None:
    """Every linear is stored with the claimed zeros, and what is reported is what is stored; tables have none."""
    for name, value in [("", None), *variants(trial.method)]:
        parameters = {name: value} if name else {}
        if name in ("", "sparsity", "pattern") and trial.accepts(**parameters):
            run = trial.run(**parameters)
            step, what = _step(trial, **parameters), f"{name}={value!r}: " if name else ""
            _ensure_zeros_of(run, what, by_rows=step.by_rows, rounded=step.rounds)


def zeros_stay_when_a_later_step_rounds(trial: Trial) -> None:
    """Pruned first and rounded then, a weight is zero wherever it was pruned."""
    for bits in (3, 8):
        steps = [trial.method(), parts.Nearest(bits=bits)]
        job = job_for(InMemory(random_model("tied")), steps, windows("tied"))
        run = carry_out(job, trial.out())
        _ensure_zeros_of(run, f"rounded to {bits} bits: ", by_rows=_step(trial).by_rows, rounded=True)


def _ensure_zeros_of(run: Run, what: str, *, by_rows: bool, rounded: bool = False) -> None:
    stored, reported = run.place.stored(run.job), {f["name"]: f for f in layer_facts(run.job, run.place)}
    for name, plan in run.job.plan.pruned.items():
        value = stored.tensor(f"{name}.weight")
        parts.ensure_zeros(value, plan.zeros, what + name, by_rows=by_rows, rounded=rounded)
        same = reported[name]["zeros"] == int((value == 0).sum())
        ensure(same, f"{what}{name}: {reported[name]['zeros']} zeros are reported")
