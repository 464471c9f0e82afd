"""Rounded inputs beside any step that rounds weights."""

import pytest
import torch

from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.inputs import Inputs
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.formats.stored import model_in_memory
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe


@pytest.fixture(scope="module")
def tied():
    return InMemory(random_model("tied"))


@pytest.mark.parametrize("steps", [("inputs:bits=4", "gptq:bits=3"), ("gptq:bits=3", "inputs:bits=4")])
def test_weights_are_those_of_the_step_beside_it_in_either_order(tied, steps):
    linears = make_plan(Recipe.parse(steps).steps, tied).linears
    assert {plan.solver.name() for plan in linears.values()} == {"gptq"}
    assert {plan.scheme.label() for plan in linears.values()} == {"W3 g32 symmetric, A4 per token"}


def test_alone_it_rounds_weights_to_eight_bits(tied):
    plan = make_plan([Inputs(bits=5, scale="static", skip=("*.o_proj",))], tied)
    assert {one.scheme.label() for one in plan.linears.values()} == {"W8 per row symmetric, A5 static"}
    assert all(name.endswith(".o_proj") for name in plan.left_alone)


@pytest.mark.parametrize("scale", ["token", "static"])
def test_inputs_take_as_many_values_as_their_bits_allow(scale, tmp_path):
    run = carry_out(
        job_for(InMemory(random_model("tied")), [Inputs(bits=4, scale=scale)], windows("tied")),
        tmp_path / "out",
    )
    model, seen = model_in_memory(run.place.stored(run.job)), []
    linear = model.get_submodule("model.layers.1.mlp.gate_proj")
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # behind the one that rounds
    with torch.no_grad():
        model(windows("tied"))
    values = [len(row.unique()) for row in seen[0].flatten(0, -2)]
    assert max(values) <= 16 and min(values) > 3
    assert (len(seen[0].unique()) <= 16) == (scale == "static")
