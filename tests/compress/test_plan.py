"""A recipe that makes no sense for a model is refused with the reason; one that does says its choices."""

import re

import pytest

from frugallm.compress.contract import resolve_group_size
from frugallm.compress.plan import make_plan
from frugallm.conformance.trial import random_model
from frugallm.errors import ParameterError, RecipeError
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe
from toy_method import ToyMethod


@pytest.fixture(scope="module")
def tied():
    return InMemory(random_model("tied"))


@pytest.fixture(scope="module")
def untied():
    return InMemory(random_model("untied"))


def plan(checkpoint, *steps):
    return make_plan(Recipe.parse(steps).steps, checkpoint)


@pytest.mark.parametrize(
    ("steps", "error", "says"),
    [
        (["gptq", "smoothquant"], RecipeError, "smoothquant after gptq.*scale rounded weights.*before gptq"),
        (
            ["gptq", "rtn"],
            RecipeError,
            r"rtn after gptq: model.layers.0.\S+ would be rounded twice.*only and skip",
        ),
        (["rtn", "rtn:bits=8"], RecipeError, "would be rounded twice"),
        (["smoothquant", "smoothquant"], RecipeError, "smoothquant after smoothquant: both scale"),
        (["embedding", "embedding"], RecipeError, "embedding stands twice"),
        (
            ["gptq:skip=[*.no_such]"],
            ParameterError,
            r"skip pattern '\*.no_such' matches no linear.*mlp.down_proj",
        ),
        (["rtn:only=[lm_head]"], ParameterError, "only pattern 'lm_head' matches no linear"),
        (["smoothquant:token=[x]"], ParameterError, "token pattern 'x' matches no linear"),
        (["gptq:skip=[*]"], RecipeError, "gptq is left with no linear"),
        (
            ["gptq:group_size=64"],
            ParameterError,
            "64 does not divide the 96 inputs of .*Sizes that fit: 16, 32; -1",
        ),
        (["gptq:group_size=0"], ParameterError, "0 does not divide"),
        (
            ["embedding:bits=4,group_size=64"],
            ParameterError,
            "64 does not divide the 96 inputs .*16, 24, 32, 48, 96",
        ),
    ],
)
def test_senseless_recipes_are_refused(tied, steps, error, says):
    with pytest.raises(error) as raised:
        plan(tied, *steps)
    assert re.search(says, str(raised.value)), str(raised.value)


def test_no_step_and_a_step_of_another_kind_are_refused(tied):
    with pytest.raises(RecipeError, match="at least one step"):
        make_plan([], tied)
    with pytest.raises(RecipeError, match="'toy_method' is not a post-training compression step"):
        make_plan([ToyMethod()], tied)


def test_the_default_group_size_is_said(tied, untied):
    assert any("gptq: group_size 32, as" in note and "96 inputs" in note for note in plan(tied, "gptq").notes)
    assert any("gptq: group_size 16" in note for note in plan(untied, "gptq").notes)
    assert plan(tied, "gptq:group_size=16").notes == ()
    assert plan(tied, "gptq:group_size=-1").notes == ()


@pytest.mark.parametrize(
    ("size", "widths", "found"),
    [
        (None, {"a": 128, "b": 384}, 128),
        (None, {"a": 576, "b": 1536}, 64),
        (None, {"a": 96, "b": 160}, 32),
        (None, {"a": 48}, 16),
        (-1, {"a": 97}, None),
        (24, {"a": 96}, 24),
    ],
)
def test_group_sizes(size, widths, found):
    assert resolve_group_size("x", size, widths) == found


def test_a_width_that_no_group_divides(tied):
    with pytest.raises(
        ParameterError, match=r"no group size from 16 up divides every width \(b has 100 inputs\)"
    ):
        resolve_group_size("x", None, {"a": 128, "b": 100})


def test_a_later_solver_replaces_the_default_of_an_earlier_rewrite(tied):
    made = plan(tied, "smoothquant", "gptq:bits=8,group_size=-1")
    assert {p.solver.name() for p in made.linears.values()} == {"gptq"}
    assert all(p.scheme.activations is not None for p in made.linears.values())
    assert [s.name() for s in made.rewrites] == ["smoothquant"]


def test_patterns_share_a_model_between_steps(tied):
    made = plan(tied, "gptq:bits=3,skip=[*.down_proj]", "rtn:bits=8,only=[*.down_proj]")
    assert {p.solver.name() for n, p in made.linears.items() if n.endswith("down_proj")} == {"rtn"}
    assert {p.scheme.weights.bits for n, p in made.linears.items() if not n.endswith("down_proj")} == {3}
    assert made.left_alone == ()


def test_what_no_step_stores_is_said(tied):
    made = plan(tied, "rtn:skip=[*.layers.1.*]")
    assert len(made.left_alone) == 7
    assert any("left in 16 bits: model.layers.1." in note and "3 more" in note for note in made.notes)


def test_a_tied_head_is_one_table_and_an_untied_head_a_second(tied, untied):
    assert list(plan(tied, "embedding").tables) == ["model.embed_tokens"]
    assert list(plan(untied, "embedding").tables) == ["model.embed_tokens", "lm_head"]
    assert plan(untied, "embedding").linears == {}
