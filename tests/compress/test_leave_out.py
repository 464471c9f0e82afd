"""A recipe without one step keeps its form: plain rounding, rounded inputs and zeros stand in, everything else is dropped."""

import pytest
import torch

from frugallm.compress.leave_out import leave_out
from frugallm.compress.plan import make_plan
from frugallm.compress.prepare import prepared
from frugallm.conformance.trial import random_model
from frugallm.errors import FrugalError
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe

#: No paper published these together.
COMPOSED = {
    "os_plus gptq lorc": ["inputs:scale=static gptq lorc", "os_plus rtn lorc", "os_plus gptq"],
    "rotate gptq:bits=3": ["gptq:bits=3", "rotate rtn:bits=3"],
    "smoothquant spqr": [
        "inputs:scale=static spqr",
        "smoothquant rtn:bits=3,group_size=16,symmetric=false",
    ],
}
OTHERS = {
    "smoothquant": ["inputs:scale=static rtn:bits=8,group_size=-1"],
    "smoothquant wanda": ["inputs:scale=static wanda rtn:bits=8,group_size=-1", "smoothquant magnitude"],
    "rotate inputs:bits=4 gptq": ["inputs:bits=4 gptq", None, "rotate inputs:bits=4 rtn"],
    "wanda:pattern=2:4 gptq": ["magnitude:pattern=2:4 gptq", "wanda:pattern=2:4 rtn"],
    "sparsegpt:bits=4,symmetric=false,sparsity=0.3": ["magnitude:sparsity=0.3 rtn:symmetric=false"],
    "mixed_bits gptq embedding": ["gptq embedding", "mixed_bits rtn embedding", "mixed_bits gptq"],
    "finequant": ["rtn:group_size=-1"],
    "awq:bits=3,grid=7": ["rtn:bits=3"],
    "gptq:grid=nvfp4": ["rtn:grid=nvfp4"],
    "gptq:grid=fp8,bits=8": ["rtn:bits=8,grid=fp8"],
    "gptq:only=[*.mlp.*] rtn:bits=8,skip=[*.mlp.*]": [
        "rtn:only=[*.mlp.*] rtn:bits=8,skip=[*.mlp.*]",
        None,
    ],
    "olive:activation=static": ["inputs:bits=4,scale=static rtn:group_size=-1"],
    "hqq:group_size=16": ["rtn:group_size=16,symmetric=false"],
    "rtn:search=mse embedding": ["rtn embedding", "rtn:search=mse"],
    "gptq lkd": ["rtn lkd", "gptq"],
}


@pytest.fixture(scope="module")
def given():
    return InMemory(random_model("untied"))


@pytest.mark.parametrize("line", [*COMPOSED, *OTHERS])
def test_what_is_left(line, given):
    recipe, expected = Recipe.parse(line.split()), (COMPOSED | OTHERS)[line]
    for index, left in enumerate(expected):
        if left is None:
            with pytest.raises(FrugalError, match="is itself the plain form"):
                leave_out(recipe.steps, index, given)
        else:
            found = leave_out(recipe.steps, index, given)
            assert found.steps == Recipe.parse(left.split()).steps
            assert set(found.instead) == set(found.steps) - set(recipe.steps)


@pytest.mark.parametrize("line", [line for line in OTHERS if "lkd" not in line] + list(COMPOSED))
def test_a_plain_step_keeps_the_form_of_the_result(line, given):
    """Bits, groups, zero points, rounded inputs and zeros of every linear, where rtn has the same."""
    steps = Recipe.parse(line.split()).steps
    whole = make_plan(steps, prepared(steps, given, 0))
    for index in range(len(steps)):
        try:
            left = leave_out(steps, index, given)
        except FrugalError:
            continue
        if not left.instead:
            continue
        plan = make_plan(left.steps, prepared(left.steps, given, 0))
        assert plan.linears.keys() == whole.linears.keys() and plan.pruned.keys() == whole.pruned.keys()
        for name, linear in plan.linears.items():
            ours, theirs = linear.scheme, whole.linears[name].scheme
            kept = {"group_size", "symmetric"} | ({"bits"} if "mixed_bits" not in line else set())
            assert ours.weights.model_dump(include=kept) == theirs.weights.model_dump(include=kept)
            assert (ours.activations is None) == (theirs.activations is None)
            if ours.activations is not None:
                assert ours.activations.bits == theirs.activations.bits
                assert ours.activations.dynamic == theirs.activations.dynamic
        assert {n: p.zeros for n, p in plan.pruned.items()} == {n: p.zeros for n, p in whole.pruned.items()}


def test_a_step_that_works_on_some_linears_is_replaced_on_these(given):
    """Smoothing rounds the inputs of all linears, one of them by token, and the weights that gptq leaves."""
    recipe = Recipe.parse(["smoothquant:token=[*.0.mlp.down_proj]", "gptq:only=[*.mlp.*]"])
    left = leave_out(recipe.steps, 0, given)
    static, token, rounding = left.instead
    down = "model.layers.0.mlp.down_proj"
    assert token.only == (down,) and token.scale == "token" and static.scale == "static"
    assert set(static.only) == set(given.linears()) - {down}
    assert set(rounding.only) == {name for name in given.linears() if ".mlp." not in name}
    assert (rounding.bits, rounding.group_size) == (8, -1)


def test_bits_chosen_linear_by_linear_are_replaced_by_their_mean(given):
    steps = Recipe.parse(["mixed_bits"]).steps
    planned = make_plan(steps, given).schemes()
    shapes = {name: given.shape(f"{name}.weight") for name in planned}
    chosen = {n: s.model_copy(update={"bits": 8 if ".mlp." in n else 3}) for n, s in planned.items()}
    sizes = torch.tensor([rows * width for rows, width in shapes.values()]).double()
    bits = torch.tensor([float(chosen[name].bits) for name in shapes]).double()
    [plain] = leave_out(steps, 0, given, chosen=chosen).steps
    assert plain.name() == "rtn" and plain.bits == round(float((sizes * bits).sum() / sizes.sum())) == 6


@pytest.mark.parametrize(
    ("line", "index", "says"),
    [
        ("embedding", 0, "nothing is left without embedding"),
        ("rotate", 0, "nothing is left without rotate"),
        ("magnitude rtn", 0, "magnitude is itself the plain form"),
        ("inputs", 0, "inputs is itself the plain form"),
    ],
)
def test_what_cannot_be_left_out_says_why(line, index, says, given):
    steps = Recipe.parse(line.split()).steps
    with pytest.raises(FrugalError, match=says):
        leave_out(steps, index, given)
