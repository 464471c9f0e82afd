"""A recipe that makes no sense for a model is refused with the reason; one that does says its choices."""

import re

import pytest
import torch

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
        (
            ["gptq", "magnitude"],
            RecipeError,
            r"magnitude after gptq: \S+ is rounded by then, and its zeros .*Put magnitude before gptq",
        ),
        (
            ["magnitude", "smoothquant"],
            RecipeError,
            "smoothing step after pruning.*smoothquant before magnitude",
        ),
        (
            ["magnitude", "random"],
            RecipeError,
            "random after magnitude: .* would be pruned twice.*only and skip",
        ),
        (
            ["magnitude:sparsity=0.3,pattern=2:4"],
            ParameterError,
            "pattern 2:4 makes 0.5 of the weights zero, not sparsity 0.3.*Leave sparsity out",
        ),
        (["magnitude:only=[lm_head]"], ParameterError, "only pattern 'lm_head' matches no linear"),
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


def test_pruning_alone_is_stored_dense_and_said(tied):
    made = plan(tied, "magnitude:skip=[*.layers.1.*]")
    assert made.linears == {} and not made.quantizes
    assert len(made.pruned) == len(made.left_alone) == 7
    assert {p.zeros.label() for p in made.pruned.values()} == {"50 % zeros"}
    assert any("neither smaller nor faster" in note for note in made.notes)
    assert not any("neither smaller" in note for note in plan(tied, "rtn").notes)


def test_pruning_then_rounding_is_one_work_of_two_steps(tied):
    made = plan(tied, "magnitude:pattern=2:4,only=[*.mlp.*]", "rtn:bits=4,group_size=16,skip=[*.up_proj]")
    work = {name.split(".")[-1]: made.work(name) for name in (*made.linears, *made.pruned)}
    assert [s.name() for s in work["gate_proj"].steps] == ["magnitude", "rtn"]
    assert work["gate_proj"].label() == "W4 g16 symmetric, 50 % zeros, 2:4"
    assert [s.name() for s in work["q_proj"].steps] == ["rtn"] and work["q_proj"].pruned is None
    assert [s.name() for s in work["up_proj"].steps] == ["magnitude"] and work["up_proj"].rounded is None
    assert work["up_proj"].label() == "dense, 50 % zeros, 2:4"
    assert made.left_alone == () and made.work("model.layers.0.no_such") is None
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    q = work["gate_proj"].form(weight, {})
    assert ((q.dequantize() == 0).view(6, -1, 4).sum(-1) >= 2).all()
    assert torch.equal(q.dequantize() == 0, work["gate_proj"].form(weight.clone(), {}).dequantize() == 0)


def test_a_default_rounds_what_a_later_step_prunes(tied):
    made = plan(tied, "smoothquant", "magnitude")
    assert {tuple(s.name() for s in made.work(n).steps) for n in made.linears} == {
        ("magnitude", "smoothquant")
    }
    assert all(p.scheme.activations is not None for p in made.linears.values())


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
