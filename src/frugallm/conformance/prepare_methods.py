"""What every method that rewrites the whole model must pass, on two small random models."""

from __future__ import annotations

import torch

from frugallm.compress.contract import PrepareMethod
from frugallm.conformance import parts
from frugallm.conformance.block_methods import (
    a_killed_run_continues_to_the_same_bytes,
    bytes_on_disk_are_the_bytes_claimed,
    every_parameter_value_stores_and_loads,
    inputs_and_settings_stay_as_they_were,
    missing_text_is_refused_before_any_work,
    shapes_stay_on_every_model,
    the_folder_loads_without_us_to_equal_logits,
    two_runs_are_equal_byte_for_byte,
)
from frugallm.conformance.examples import variants
from frugallm.conformance.outcome import Check, ensure
from frugallm.conformance.trial import KINDS, Trial, carry_out, job_for, random_model, windows
from frugallm.formats.stored import model_in_memory
from frugallm.method import Method
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.in_memory import InMemory
from frugallm.models.open import dense_model


def checks(method: type[Method]) -> list[Check]:
    """Return the checks that apply to a method that prepares the model."""
    return [
        the_prepared_model_computes_the_same,
        a_prepared_model_is_a_checkpoint_like_any_other,
        shapes_stay_on_every_model,
        two_runs_are_equal_byte_for_byte,
        inputs_and_settings_stay_as_they_were,
        bytes_on_disk_are_the_bytes_claimed,
        the_folder_loads_without_us_to_equal_logits,
        every_parameter_value_stores_and_loads,
        a_killed_run_continues_to_the_same_bytes,
        missing_text_is_refused_before_any_work,
        any_later_step_rounds_the_prepared_model,
    ]


def _prepared(trial: Trial, base: Checkpoint, seed: int = 0, **parameters: object) -> Checkpoint:
    step = trial.method(**parameters)
    assert isinstance(step, PrepareMethod)
    return step.prepare(base, seed)


def the_prepared_model_computes_the_same(trial: Trial) -> None:
    """Before anything is rounded the weights are others, and the logits the same."""
    for parameters in ({}, *({name: value} for name, value in variants(trial.method))):
        for kind in KINDS:
            base = InMemory(random_model(kind))
            other = _prepared(trial, base, **parameters)
            with torch.inference_mode():
                before, after = (dense_model(one)(windows(kind)).logits for one in (base, other))
            error = float((after - before).abs().max() / before.abs().max())
            ensure(
                error <= parts.REWRITE_TOLERANCE, f"{parameters}: logits move by {error:.1e} of the largest"
            )
            same = all(torch.equal(base.tensor(name), other.tensor(name)) for name in base.names())
            ensure(not same, f"{parameters}: nothing is rewritten")


def a_prepared_model_is_a_checkpoint_like_any_other(trial: Trial) -> None:
    """Tensors fit the configuration, rows are rows of them, and the seed decides them and the digest."""
    for kind in KINDS:
        base = InMemory(random_model(kind))
        one, again, other = (_prepared(trial, base, seed) for seed in (0, 0, 1))
        one.validate()
        for name in one.names():
            tensor = one.tensor(name)
            ensure(tensor.shape == one.shape(name), f"{name} has another shape than it says")
            ensure(torch.equal(one.rows(name, 3, 9), tensor[3:9]), f"rows of {name} are others than its own")
            ensure(torch.equal(again.tensor(name), tensor), f"{name} is another the second time")
        ensure(one.digest() == again.digest() != base.digest(), "the digest does not say what was prepared")
        ensure(one.digest() != other.digest(), "another seed has the same digest")


def any_later_step_rounds_the_prepared_model(trial: Trial) -> None:
    """Whatever is left to do at run time, a step that rounds in 8 bits leaves the logits close to the original's."""
    for name, value in [("", None), *variants(trial.method)]:
        parameters = {name: value} if name else {}
        model = random_model("tied")
        steps = [trial.method(**parameters), parts.Nearest(bits=8)]
        run = carry_out(job_for(InMemory(model), steps, windows("tied")), trial.out())
        with torch.inference_mode():
            before = model(windows("tied")).logits
            after = model_in_memory(run.place.stored(run.job))(windows("tied")).logits
        error = float((after - before).norm() / before.norm())
        ensure(error <= 0.1, f"{parameters}: rounded to 8 bits, the logits move by {error:.1%}")
