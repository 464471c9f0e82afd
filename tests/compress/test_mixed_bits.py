"""Mixed bits: the allocation against trying everything, the errors against float64, and what is stored in the end."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugallm.choice import bits_per_weight
from frugallm.compress.contract import together
from frugallm.compress.plan import make_plan
from frugallm.compress.quantize import allocation
from frugallm.compress.quantize.allocation import allocate
from frugallm.compress.quantize.awq import AWQ
from frugallm.compress.quantize.finequant import FineQuant
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.mixed_bits import MixedBits
from frugallm.compress.quantize.rtn import RTN
from frugallm.conformance.stored_models import loads_outside_as_in_memory
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import ParameterError
from frugallm.formats.decoded import Decoded
from frugallm.formats.quantized_tensor import WeightScheme
from frugallm.job import needs_text
from frugallm.models.in_memory import InMemory
from frugallm.models.open import dense_model
from frugallm.walk.importance import input_statistics

BITS = (2, 3, 4, 5, 6, 8)


@pytest.fixture(scope="module")
def model():
    return InMemory(random_model("tied"))


@pytest.fixture(scope="module")
def statistics(model, tmp_path_factory):
    needs = frozenset({"mean_square", "gain"})
    return input_statistics(model, windows("tied"), needs, tmp_path_factory.mktemp("w"), fast=torch.float32)


def tried_all(errors, costs, budget):
    """Return the least sum of errors of all allocations within the budget."""
    found = [
        sum(error[i] for error, i in zip(errors, picks))
        for picks in itertools.product(range(len(errors[0])), repeat=len(errors))
        if sum(cost[i] for cost, i in zip(costs, picks)) <= budget
    ]
    return min(found, default=None)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1.2))
def test_the_allocation_is_the_best_of_all(seed, parts, options, share):
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(parts, options, generator=generator, dtype=torch.float64)
    costs = torch.randint(1, 50, (parts, options), generator=generator).tolist()
    low, high = sum(map(min, costs)), sum(map(max, costs))
    budget = int(0.9 * low + share * (high - 0.9 * low))
    picks = allocate(errors, costs, budget)
    best = tried_all(errors.tolist(), costs, budget)
    assert (picks is None) == (best is None)
    if picks is not None:
        assert sum(cost[i] for cost, i in zip(costs, picks)) <= budget
        assert sum(float(error[i]) for error, i in zip(errors, picks)) == pytest.approx(best)


def test_costs_finer_than_the_steps_are_rounded_up_and_the_budget_holds(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(6, 3, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    costs = [[1_000_003 * (i + 1), 2_000_029 * (i + 1), 4_000_037 * (i + 1)] for i in range(6)]
    budget = 50_000_000
    exact = tried_all(errors.tolist(), costs, budget)
    for steps, apart in ((2**16, 1e-9), (100, 0.3)):
        monkeypatch.setattr(allocation, "STEPS", steps)
        picks = allocate(errors, costs, budget)
        assert sum(cost[i] for cost, i in zip(costs, picks)) <= budget
        assert exact - 1e-12 <= sum(float(e[i]) for e, i in zip(errors, picks)) <= exact * (1 + apart)


def test_a_budget_for_everything_gives_everything_its_best():
    errors = torch.tensor([[3.0, 1.0], [2.0, 0.5]])
    assert allocate(errors, [[2, 8], [2, 8]], 10**9) == [1, 1]
    assert allocate(errors, [[2, 8], [2, 8]], 4) == [0, 0]
    assert allocate(errors, [[2, 8], [2, 8]], 10) == [1, 0]
    assert allocate(errors, [[2, 8], [2, 8]], 3) is None


@pytest.mark.parametrize("index", [0, 1])
def test_the_gain_is_what_an_error_of_the_outputs_changes_behind_the_block(model, statistics, index):
    plain = dense_model(model).double()
    layer, states = plain.model.layers[index], []
    layer.register_forward_hook(lambda m, x, y: states.append(y[0] if isinstance(y, tuple) else y))
    with torch.no_grad():
        plain(windows("tied"))
        for paths in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",)):
            lost = size = 0.0
            before = {path: layer.get_submodule(path).weight.clone() for path in paths}
            for path, weight in before.items():
                square = statistics[f"model.layers.{index}.{path}"]["mean_square"].double()
                rounded = round_to_nearest(weight.float(), WeightScheme(bits=4, group_size=32)).dequantize()
                lost += float(((rounded - weight).square() * square).sum())
                size += float((weight.square() * square).sum())
                layer.get_submodule(path).weight.copy_(rounded)
            plain(windows("tied"))
            for path, weight in before.items():
                layer.get_submodule(path).weight.copy_(weight)
            change = (states[-1] - states[0]).square().sum(-1) / states[0].square().sum(-1)
            wanted = float(change.mean()) * size / lost
            assert wanted > 0
            for path in paths:
                gain = float(statistics[f"model.layers.{index}.{path}"]["gain"])
                assert gain == pytest.approx(wanted, rel=1e-3)


def test_looking_at_gains_changes_nothing(model, tmp_path):
    needs = frozenset({"mean_square"})
    with_gain = input_statistics(model, windows("tied"), needs | {"gain"}, tmp_path, fast=torch.float32)
    without = input_statistics(model, windows("tied"), needs, tmp_path, fast=torch.float32)
    for name, found in without.items():
        assert torch.equal(found["mean_square"], with_gain[name]["mean_square"])


def test_errors_are_those_of_the_equations(model, statistics):
    step, plan = MixedBits(group_size=16), make_plan([MixedBits(group_size=16)], model)
    planned = {n: p.scheme.weights for n, p in plan.linears.items()}
    names = together(model, planned)[0]
    forms = [{n: planned[n].model_copy(update={"bits": b}) for n in names} for b in (2, 5)]
    lost, size = [0.0, 0.0], 0.0
    for name in names:
        weight, m = model.tensor(f"{name}.weight").double(), statistics[name]["mean_square"].double()
        size += float((weight.square() * m).sum())
        for i, bits in enumerate((2, 5)):
            groups = weight.view(len(weight), -1, 16)
            scale = (groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)).bfloat16().double()
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            rounded = (groups / scale).round().clamp(low, high) * scale
            lost[i] += float(((rounded.view_as(weight) - weight).square() * m).sum())
    gain = float(statistics[names[0]]["gain"])
    wanted = [gain * one / size for one in lost]
    assert step._errors(model, forms, statistics) == pytest.approx(wanted, rel=1e-3)
    assert wanted[0] > 10 * wanted[1] > 0


def codes_mean(model, linears):
    sizes = {n: model.tensor(f"{n}.weight").numel() for n in linears}
    return sum(p.scheme.weights.bits * sizes[n] for n, p in linears.items()) / sum(sizes.values())


@pytest.mark.parametrize("average", [2.5, 3.5, 6.0])
def test_the_mean_is_kept_and_what_shares_an_input_has_the_same_bits(model, tmp_path, average):
    run = carry_out(job_for(model, [MixedBits(average=average)], windows("tied")), tmp_path / "run")
    linears = run.job.plan.linears
    assert average - 0.25 < codes_mean(model, linears) <= average
    assert len({p.scheme.weights.bits for p in linears.values()}) > 1
    for names in together(model, linears):
        assert len({linears[n].scheme.weights for n in names}) == 1


def test_more_bits_go_to_what_costs_more(model, statistics):
    planned = {n: p.scheme.weights for n, p in make_plan([MixedBits()], model).linears.items()}
    favored = "model.layers.1.self_attn.o_proj"
    raised = {**statistics, favored: {**statistics[favored], "gain": torch.tensor(1e6)}}
    before = MixedBits(average=3).schemes(model, planned, statistics)
    after = MixedBits(average=3).schemes(model, planned, raised)
    assert after[favored].bits == 8 > before[favored].bits
    assert sum(s.bits for n, s in after.items() if n != favored) < sum(
        s.bits for n, s in before.items() if n != favored
    )


def test_one_choice_is_rounding_with_those_bits(model, tmp_path):
    ours = carry_out(job_for(model, [MixedBits(choices=(4,))], windows("tied")), tmp_path / "ours")
    plain = carry_out(job_for(model, [RTN(bits=4)], windows("tied")), tmp_path / "plain")
    assert ours.digest() == plain.digest()


def test_a_solver_rounds_with_the_bits_that_were_chosen_and_its_own_groups(model, tmp_path):
    steps = [MixedBits(average=3.5), GPTQ(bits=4, group_size=16)]
    run = carry_out(job_for(model, steps, windows("tied")), tmp_path / "run")
    linears = run.job.plan.linears
    assert {p.solver.name() for p in linears.values()} == {"gptq"}
    assert {p.scheme.weights.group_size for p in linears.values()} == {16}
    assert codes_mean(model, linears) <= 3.5 and len({p.scheme.weights.bits for p in linears.values()}) > 1
    groups = json.loads((run.folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {g["weights"]["num_bits"] for g in groups.values()} == {
        p.scheme.weights.bits for p in linears.values()
    }
    loads_outside_as_in_memory(run, windows("tied"))
    back, stored = Decoded(run.folder), run.place.stored(run.job)
    for name in linears:
        assert torch.equal(back.tensor(f"{name}.weight").float(), stored.tensor(f"{name}.weight"))


@pytest.mark.parametrize("steps", [(AWQ(bits=3), MixedBits()), (MixedBits(), AWQ(bits=3))])
def test_who_only_chooses_leaves_the_rounding_to_others(model, steps):
    assert {p.solver.name() for p in make_plan(steps, model).linears.values()} == {"awq"}


def test_groups_are_chosen_first_and_then_bits(model, tmp_path):
    steps = [FineQuant(alpha=0), MixedBits(average=4)]
    run = carry_out(job_for(model, steps, windows("tied")), tmp_path / "run")
    weights = [p.scheme.weights for p in run.job.plan.linears.values()]
    assert len({w.bits for w in weights}) > 1 and {w.group_size for w in weights} == {32}
    assert any(note.startswith("finequant and mixed_bits chose") for note in run.job.plan.notes)


def test_a_budget_in_bytes_holds_scales_as_well(model, tmp_path):
    budget = 0.05
    run = carry_out(job_for(model, [MixedBits(megabytes=budget)], windows("tied")), tmp_path / "run")
    linears = run.job.plan.linears
    stored = sum(
        t.nbytes for n, t in run.tensors().items() if n.rpartition(".")[0] in linears and "shape" not in n
    )
    weights = sum(model.tensor(f"{n}.weight").numel() for n in linears)
    schemes = {n: p.scheme.weights for n, p in linears.items()}
    assert 0.9 * budget * 1e6 < stored <= budget * 1e6
    assert bits_per_weight(schemes, model) * weights / 8 == pytest.approx(stored)


def test_it_reads_text_before_the_work_and_resumes_without_reading_it_again(model):
    assert needs_text(make_plan([MixedBits()], model))
    assert not needs_text(make_plan([FineQuant()], model))


def test_budgets_that_cannot_be_met_are_refused(model, tmp_path):
    with pytest.raises(ParameterError, match="average 2 is below the fewest bits in choices, 3"):
        MixedBits(average=2, choices=(3, 4))
    with pytest.raises(ParameterError, match="choices is empty"):
        MixedBits(choices=())
    with pytest.raises(
        ParameterError, match=r"0.001 megabytes are too few: with 2 bits everywhere it is 0.0"
    ):
        carry_out(job_for(model, [MixedBits(megabytes=0.001)], windows("tied")), tmp_path / "run")
