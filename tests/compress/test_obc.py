"""The greedy solvers against the equations of Optimal Brain Compression, one row at a time in float64."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import moment, random_weight

from frugallm.compress.plan import make_plan
from frugallm.compress.prune.unstructured.masks import Sparsity
from frugallm.compress.quantize import solvers_greedy
from frugallm.compress.quantize.grids import encode, fit
from frugallm.compress.quantize.obc import OBC
from frugallm.compress.quantize.solvers import compensate, proxy_loss, prune_and_compensate
from frugallm.compress.quantize.solvers_greedy import prune_greedily, quantize_greedily
from frugallm.conformance import parts
from frugallm.conformance.trial import random_model
from frugallm.errors import ParameterError, RecipeError
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe

HALF = Sparsity(share=0.5)


def damped(h, damp=0.01):
    h = h.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    return h + damp * h.diagonal().mean() * torch.eye(len(h))


def quantized_row(w, h, scale, zero, low, high, gone=()):
    """OBQ of one row: ``scale`` and ``zero (in,)``; the inverse of what is left is computed anew in every step."""
    w, codes = w.double().clone(), torch.zeros(len(w), dtype=torch.int8)
    codes[list(gone)] = zero[list(gone)].to(torch.int8)
    free = [j for j in range(len(w)) if j not in gone]
    while free:
        inverse = torch.linalg.inv(h[free][:, free])
        best, taken = None, 0
        for place, j in enumerate(free):
            code = (torch.round(w[j] / scale[j]) + zero[j]).clamp(low, high)
            error = w[j] - scale[j] * (code - zero[j])
            outside = error.abs() > scale[j] / 2
            cost = -(error**2) if outside else error**2 / inverse[place, place]
            if best is None or cost < best[0]:
                best, taken = (cost, j, code, error), place
        _, j, code, error = best
        codes[j] = code.to(torch.int8)
        w[free] -= inverse[taken] * error / inverse[taken, taken]
        free.remove(j)
    return codes


def quantized(weight, h, scale, zero, scheme, pruned=None):
    per_scale = scheme.columns_per_scale(weight.shape[1])
    zero = torch.zeros(scale.shape) if zero is None else zero
    rows = []
    for i, w in enumerate(weight):
        s, z = (x[i].double().repeat_interleave(per_scale) for x in (scale, zero))
        gone = () if pruned is None else pruned[i].nonzero()[:, 0].tolist()
        rows.append(quantized_row(w, damped(h), s, z, *scheme.code_range, gone))
    return torch.stack(rows)


def traced_row(w, h, count, group=None):
    """ExactOBS of one row: yield the entry that becomes zero next, what it costs, and the row after it."""
    w, free = w.double().clone(), list(range(len(w)))
    gone = []
    for _ in range(count):
        inverse = torch.linalg.inv(h[free][:, free])
        costs = {j: float(w[j] ** 2 / inverse[p, p]) for p, j in enumerate(free)}
        if group:
            costs = {
                j: c for j, c in costs.items() if sum(g // group == j // group for g in gone) < group / 2
            }
        j = min(costs, key=costs.__getitem__)
        place = free.index(j)
        w[free] -= inverse[place] * w[j] / inverse[place, place]
        w[j] = 0
        free.remove(j)
        gone.append(j)
        yield j, costs[j], w.clone()


def pruned(weight, h, sparsity):
    """The global step with a heap's rule: the next zero goes to the row whose next one costs least."""
    width, h = weight.shape[1], damped(h)
    if sparsity.group:
        count = width // sparsity.group * sparsity.count(sparsity.group)
        return torch.stack([list(traced_row(w, h, count, sparsity.group))[-1][2] for w in weight])
    traces = [list(traced_row(w, h, width)) for w in weight]
    reached = [0] * len(weight)
    for _ in range(sparsity.count(weight.numel())):
        nexts = {i: traces[i][reached[i]][1] for i in range(len(weight)) if reached[i] < width}
        reached[min(nexts, key=nexts.__getitem__)] += 1
    rows = [traces[i][n - 1][2] if n else weight[i].double() for i, n in enumerate(reached)]
    return torch.stack(rows)


def differing(a, b):
    return (a != b).float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "bits"), [(16, 3), (None, 4)])
def test_codes_are_those_of_the_equations(dtype, symmetric, group, bits):
    scheme = WeightScheme(bits=bits, symmetric=symmetric, group_size=group)
    weight, h = random_weight(4, 80, 3), moment(80, 500)
    scale, zero = fit(weight, scheme)
    scale = scale * 0.8  # so that some entries lie off the grid
    ours = quantize_greedily(weight.to(dtype), h, scale, zero, scheme).codes
    theirs = quantized(weight, h, scale, zero, scheme)
    # A score that is equal to the last bit sends the rest of its row another way.
    same = (ours == theirs).all(1).float().mean()
    assert same == 1 if dtype is torch.float64 else same > 0.6
    assert differing(theirs, encode(weight, scale, zero, scheme)) > 0.05  # it is not plain rounding


@pytest.mark.parametrize(
    "sparsity",
    [HALF, Sparsity(share=0.7), Sparsity(share=0.5, pattern="2:4"), Sparsity(share=0.5, pattern="4:8")],
)
def test_zeros_and_values_are_those_of_the_equations(sparsity):
    weight, h = random_weight(3, 72, 4), moment(72, 400)
    theirs = pruned(weight, h, sparsity)
    exact = prune_greedily(weight.double(), h, sparsity)
    assert torch.equal(exact == 0, theirs == 0)
    torch.testing.assert_close(exact, theirs, rtol=1e-5, atol=1e-6)
    ours = prune_greedily(weight, h, sparsity)
    assert ours.dtype == torch.float32 and ((ours == 0) != (theirs == 0)).sum() <= 4
    assert int((ours == 0).sum()) == sparsity.count(ours.numel())


def test_pruned_entries_are_out_of_h_before_anything_is_rounded():
    scheme = WeightScheme(bits=3, group_size=16)
    weight, h = random_weight(5, 48, 5), moment(48, 300)
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    weight = weight.masked_fill(gone, 0.0)
    scale, zero = fit(weight, scheme)
    q = quantize_greedily(weight.double(), h, scale, zero, scheme, pruned=gone)
    assert torch.equal(q.codes, quantized(weight, h, scale, zero, scheme, gone))
    assert not q.dequantize()[gone].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_in_one_order_for_all_rows_it_is_gptq(symmetric):
    scheme = WeightScheme(bits=3, symmetric=symmetric, group_size=16)
    weight, h = random_weight(40, 96, 6), moment(96, 500)
    scale, zero = fit(weight, scheme)
    for act_order in (False, True):
        order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(96)
        ours = quantize_greedily(weight, h, scale, zero, scheme, damp=0.0, order=order)
        theirs = compensate(weight, h, scale, zero, scheme, damp=0.0, act_order=act_order)
        assert differing(ours.codes, theirs.codes) <= 2e-3
    assert differing(ours.codes, quantize_greedily(weight, h, scale, zero, scheme, damp=0.0).codes) > 0.05


@pytest.mark.parametrize("symmetric", [True, False])
def test_uncorrelated_inputs_are_rounded_to_nearest(symmetric):
    scheme = WeightScheme(bits=3, symmetric=symmetric, group_size=16)
    weight = random_weight(33, 96, 5)
    scale, zero = fit(weight, scheme)
    h = torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.1)
    assert torch.equal(
        quantize_greedily(weight, h, scale, zero, scheme).codes, encode(weight, scale, zero, scheme)
    )


def test_uncorrelated_inputs_are_pruned_by_size_and_left_alone():
    weight = random_weight(9, 96, 2)
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.1
    scores = (weight.square() * diagonal).flatten()
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.argsort()[: 9 * 48]] = True
    value = prune_greedily(weight, torch.diag(diagonal), HALF, damp=0.0)
    assert torch.equal(value, weight.masked_fill(mask.view_as(weight), 0.0))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.sampled_from([2, 3, 4]), st.booleans(), st.integers(0, 5))
def test_it_is_no_worse_than_nearest(rows, bits, symmetric, seed):
    method = OBC(bits=bits, symmetric=symmetric, group_size=16)
    weight, statistics = parts.example(4 * rows, 96, method.solve_needs, seed)
    h, scheme = statistics["second_moment"], method.weights({"x": 96})
    ours = method.solve(weight, scheme, statistics)
    nearest = QuantizedTensor(encode(weight, ours.scale, ours.zero, scheme), ours.scale, ours.zero, scheme)
    assert proxy_loss(weight, ours.dequantize(), h) < proxy_loss(weight, nearest.dequantize(), h)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_pruning_alone_and_both_at_once_keep_their_word(pattern):
    """What the checks of all methods try only with parameters that this one does not have by default."""
    sparsity = 0.4 if pattern == "unstructured" else 0.0
    alone, both = (OBC(bits=bits, sparsity=sparsity, pattern=pattern) for bits in (None, 4))
    needs, zeros = alone.solve_needs, alone.zeros({"x": 96})
    assert zeros.share == (sparsity or 0.5)
    parts.pruner_zeroes_what_it_says(alone.prune, zeros, 96, needs, by_rows=False)
    parts.pruner_is_no_worse_than_its_zeros(alone.prune, 96, needs)
    weight, statistics = parts.example(20, 96, needs)
    value = alone.prune(weight, statistics)
    q = both.solve(weight, both.weights({"x": 96}), statistics)
    assert not q.dequantize()[value == 0].any()
    h = statistics["second_moment"]
    mean_square = h.diagonal()
    scale, zero = fit(value, q.scheme, "mse", mean_square)
    nearest = QuantizedTensor(encode(value, scale, zero, q.scheme), scale, zero, q.scheme)
    assert proxy_loss(weight, q.dequantize(), h) < proxy_loss(weight, nearest.dequantize(), h)


@pytest.mark.parametrize("sparsity", [HALF, Sparsity(share=0.5, pattern="2:4")])
def test_the_cheapest_zeros_cost_less_than_those_of_one_order_for_all_rows(sparsity):
    for seed in range(3):
        weight, h = random_weight(16, 96, seed), moment(96, 800, seed)
        greedy, ordered = (prune(weight, h, sparsity) for prune in (prune_greedily, prune_and_compensate))
        assert proxy_loss(weight, greedy, h) < 0.95 * proxy_loss(weight, ordered, h)


def test_rows_do_not_see_each_other_when_nothing_is_pruned():
    method = OBC(bits=3)
    parts.solver_treats_rows_alike(method.solve, method.weights({"x": 96}), 96, method.solve_needs)


def test_some_rows_at_a_time_are_all_rows(monkeypatch):
    scheme = WeightScheme(bits=3, group_size=16)
    weight, h = random_weight(11, 96, 8), moment(96, 500)
    scale, zero = fit(weight, scheme)
    at_once = quantize_greedily(weight, h, scale, zero, scheme).codes, prune_greedily(weight, h, HALF)
    monkeypatch.setattr(solvers_greedy, "ENTRIES_AT_ONCE", 4 * 96**2)
    in_parts = quantize_greedily(weight, h, scale, zero, scheme).codes, prune_greedily(weight, h, HALF)
    assert (at_once[0] != in_parts[0]).any(
        1
    ).sum() <= 1  # products of other sizes may end in another last bit
    assert ((at_once[1] == 0) != (in_parts[1] == 0)).sum() <= 4


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_fewer_tokens_than_columns_can_be_solved(damp):
    scheme = WeightScheme(bits=4, group_size=32)
    weight, h = random_weight(8, 64, 8), moment(64, 10)
    scale, zero = fit(weight, scheme)
    q = quantize_greedily(weight, h, scale, zero, scheme, damp=damp)
    nearest = QuantizedTensor(encode(weight, scale, zero, scheme), scale, zero, scheme)
    assert proxy_loss(weight, q.dequantize(), h) < proxy_loss(weight, nearest.dequantize(), h)
    value = prune_greedily(weight, h, HALF, damp=damp)
    assert proxy_loss(weight, value, h) < proxy_loss(weight, weight.masked_fill(value == 0, 0.0), h)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_columns_and_no_input_are_zero(symmetric):
    scheme = WeightScheme(bits=4, symmetric=symmetric, group_size=16)
    weight, h = random_weight(8, 48, 6), moment(48, 300)
    dead = torch.tensor([0, 17, 47])
    h[dead], h[:, dead] = 0, 0
    scale, zero = fit(weight, scheme)
    before = weight.clone(), h.clone()
    for moments in (h, torch.zeros(48, 48)):
        q = quantize_greedily(weight, moments, scale, zero, scheme)
        gone = moments.diagonal() == 0
        assert (q.dequantize()[:, gone] == 0).all()
        value = prune_greedily(weight, moments, HALF)
        assert (value[:, gone] == 0).all()
    assert torch.equal(before[0], weight) and torch.equal(before[1], h)


@cache
def checkpoint():
    return InMemory(random_model("tied"))


def plan(*steps):
    return make_plan(Recipe.parse(steps).steps, checkpoint())


def test_it_rounds_what_another_step_has_pruned_and_is_rounded_by_another():
    first = plan("wanda", "obc:bits=3")
    work = first.work("model.layers.0.mlp.up_proj")
    assert [step.name() for step in work.steps] == ["wanda", "obc"]
    second = plan("obc:bits=null,sparsity=0.5", "gptq")
    work = second.work("model.layers.0.mlp.up_proj")
    assert [step.name() for step in work.steps] == ["obc", "gptq"]
    assert plan("obc:pattern=2:4").work("model.layers.0.mlp.up_proj").pruned.zeros.share == 0.5
    assert plan("obc").pruned == {}


@pytest.mark.parametrize(
    ("steps", "error", "says"),
    [
        (["obc:bits=null"], ParameterError, "obc: nothing to do without bits and without sparsity"),
        (["obc:pattern=2:4,sparsity=0.3"], ParameterError, "makes 0.5 of the weights zero, not sparsity 0.3"),
        (["wanda", "obc:sparsity=0.5"], RecipeError, "pruned twice"),
        (["obc", "gptq"], RecipeError, "rounded twice"),
    ],
)
def test_what_makes_no_sense_is_refused(steps, error, says):
    with pytest.raises(error, match=says):
        plan(*steps)


def test_long_work_is_said_beforehand():
    narrow, wide = {"a.q": (576, 576)}, {"a.q": (576, 576), "a.down": (2048, 8192)}
    assert OBC().notes(narrow) == ()
    (note,) = OBC().notes(wide)
    assert "for 2 linears" in note and "a.down" in note
    longer = OBC(sparsity=0.5).notes(wide)
    assert longer != (note,)
