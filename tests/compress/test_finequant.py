"""FineQuant: the rule against float64 written out, the choice in plans, folders and resumed runs."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import random_weight

from frugallm.choice import bits_per_weight, choose_schemes, settle
from frugallm.compress.contract import together
from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.finequant import FineQuant, between, group_size
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.llm_int8 import LLMInt8
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.smoothquant import SmoothQuant
from frugallm.compress.quantize.spqr import SpQR
from frugallm.conformance.parts import example
from frugallm.conformance.stored_models import loads_outside_as_in_memory
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import RecipeError
from frugallm.formats.decoded import Decoded
from frugallm.formats.quantized_tensor import WeightScheme
from frugallm.models.in_memory import InMemory
from frugallm.progress import Progress


class Uneven(InMemory):
    """A model in whose second block the queries have one wide weight in every 32 columns, and the outputs one a row."""

    def tensor(self, name):
        weight = super().tensor(name).clone()
        if name == "model.layers.1.self_attn.q_proj.weight":
            weight[:, ::32] = 9.0
        if name == "model.layers.1.self_attn.o_proj.weight":
            weight[:, 0] = 9.0
        return weight


@pytest.fixture(scope="module")
def model():
    return Uneven(random_model("tied"))


def rho(weights, size):
    """Equation (1), group by group, in plain floats."""
    squares = [
        max(abs(x) for x in row[k : k + size]) ** 2
        for weight in weights
        for row in weight.double().tolist()
        for k in range(0, len(row), size)
    ]
    return sum(squares) / len(squares)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(0, 3), st.integers(1, 3))
def test_the_size_is_that_of_the_rule(seed, alpha, count):
    weights = [random_weight(5 + i, 128, seed + i) ** 3 for i in range(count)]
    sizes = [128, 64, 32, 16]
    allowed = [s for s in sizes if rho(weights, s) <= (1 + alpha) * rho(weights, 16) * (1 + 1e-9)]
    assert group_size(iter(weights), sizes, alpha) == max(allowed)


def test_even_weights_take_whole_rows_and_one_wide_weight_a_row_takes_small_groups():
    even = torch.ones(4, 128)
    assert group_size([even], [128, 64, 32], 0.0) == 128
    wide = even.clone()
    wide[:, 5] = 50.0
    assert group_size([wide], [128, 64, 32], 0.25) == 32
    everywhere = even.clone()
    everywhere[:, ::32] = 50.0
    assert group_size([everywhere], [128, 64, 32], 0.0) == 128
    assert group_size([torch.zeros(2, 128)], [128, 64, 32], 0.0) == 128
    # One size for what is looked at together, by all rows of it.
    assert group_size([even, wide], [128, 64, 32], 0.25) == 32


@pytest.mark.parametrize(
    ("step", "width", "sizes"),
    [
        (FineQuant(), 576, [576, 64, 32]),
        (FineQuant(), 1536, [1536, 512, 256, 128, 64, 32]),
        (FineQuant(least=128), 1536, [1536, 512, 256, 128]),
        (FineQuant(largest=128), 1536, [128, 64, 32]),
        (FineQuant(largest=128), 64, [64, 32]),
        (FineQuant(largest=16), 64, [16]),
        (FineQuant(), 100, [100]),
        (FineQuant(largest=128), 200, [200]),
        (FineQuant(least=16), 112, [112, 16]),
    ],
)
def test_sizes_are_the_row_and_powers_of_two(step, width, sizes):
    assert step.sizes(width) == sizes


def chosen(model, *steps):
    plan = make_plan(steps, model)
    return choose_schemes(plan, model, {})


def test_linears_that_share_an_input_get_one_size_and_others_their_own(model):
    found = chosen(model, FineQuant(bits=3))
    block = "model.layers.1.self_attn"
    assert found[f"{block}.q_proj"] == found[f"{block}.k_proj"] == found[f"{block}.v_proj"]
    assert found[f"{block}.q_proj"].group_size is None  # its ranges are alike at every size
    assert found[f"{block}.o_proj"].group_size == 32
    assert {s.bits for s in found.values()} == {3} and found.keys() == set(model.linears())


def test_a_choice_that_parts_what_engines_fuse_is_refused(model, monkeypatch):
    def apart(self, checkpoint, planned, statistics):
        return {n: WeightScheme(bits=3 if n.endswith("q_proj") else 4) for n in planned}

    monkeypatch.setattr(FineQuant, "schemes", apart)
    with pytest.raises(RecipeError, match=r"finequant stores linears that engines fuse .*q_proj W3 per row"):
        chosen(model, FineQuant())


def test_siblings_that_are_planned_apart_may_stay_so(model):
    steps = [FineQuant(), RTN(bits=3, skip=("*.v_proj",)), RTN(bits=8, only=("*.v_proj",))]
    found = chosen(model, *steps)
    block = "model.layers.1.self_attn"
    assert [found[f"{block}.{p}_proj"].bits for p in "qkv"] == [3, 3, 8]


def test_a_later_solver_rounds_in_the_groups_that_were_chosen(model, tmp_path):
    steps = [FineQuant(), GPTQ(bits=3, group_size=16)]
    run = carry_out(job_for(model, steps, windows("tied")), tmp_path / "run")
    linears = run.job.plan.linears
    assert {p.solver.name() for p in linears.values()} == {"gptq"}
    assert {p.scheme.weights.bits for p in linears.values()} == {3}
    assert {n: p.scheme.weights.group_size for n, p in linears.items()} == {
        n: s.group_size for n, s in chosen(model, FineQuant()).items()
    }


def test_names_that_the_step_does_not_touch_keep_their_own_scheme(model):
    steps = [FineQuant(bits=3, only=("*.mlp.*",)), RTN(bits=8, group_size=16, skip=("*.mlp.*",))]
    found = chosen(model, *steps)
    assert {s.label() for n, s in found.items() if ".mlp." not in n} == {"W8 g16 symmetric"}
    assert {s.bits for n, s in found.items() if ".mlp." in n} == {3}


def test_it_takes_over_from_a_default_of_fixed_bits_and_refuses_a_solver_of_fixed_bits(model):
    smoothed = make_plan([SmoothQuant(activation="token"), FineQuant(bits=4)], model)
    assert {p.solver.name() for p in smoothed.linears.values()} == {"finequant"}
    assert all(p.scheme.activations is not None for p in smoothed.linears.values())
    assert {s.bits for s in choose_schemes(smoothed, model, {}).values()} == {4}
    with pytest.raises(
        RecipeError, match="finequant before llm_int8: its grid is fixed, W8 per row symmetric"
    ):
        chosen(model, FineQuant(), LLMInt8())


def test_a_scheme_that_cannot_be_is_refused(model, monkeypatch):
    def none(self, checkpoint, planned, statistics):
        return {n: s.model_copy(update={"bits": 9}) for n, s in planned.items()}

    monkeypatch.setattr(FineQuant, "schemes", none)
    with pytest.raises(
        RecipeError, match=r"finequant before gptq: W9 per row symmetric cannot be: .*less than"
    ):
        chosen(model, FineQuant(), GPTQ(group_size=-1))


def test_scales_of_eight_bits_with_rounded_inputs_are_float32_and_those_of_four_are_not(model):
    plan = make_plan([SmoothQuant(activation="token"), FineQuant(bits=8)], model)
    assert {p.scheme.weights.scale_dtype for p in plan.linears.values()} == {"float32"}
    asked = choose_schemes(plan, model, {})
    assert {s.scale_dtype for s in asked.values()} == {"bfloat16"}
    settled = plan.with_schemes(asked)
    assert {p.scheme.weights.scale_dtype for p in settled.linears.values()} == {"float32"}
    four = {n: s.model_copy(update={"bits": 4}) for n, s in asked.items()}
    settled = plan.with_schemes(four)
    assert {p.scheme.weights.scale_dtype for p in settled.linears.values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([GPTQ(), FineQuant()], "must be known before it is rounded"),
        ([FineQuant(), FineQuant(bits=3)], "both choose how"),
    ],
)
def test_orders_without_sense_are_refused(model, steps, says):
    with pytest.raises(RecipeError, match=says):
        make_plan(steps, model)


def test_the_folder_has_a_group_for_each_size_and_plain_transformers_loads_it(model, tmp_path):
    run = carry_out(job_for(model, [FineQuant(bits=3)], None), tmp_path / "run")
    config = json.loads((run.folder / "config.json").read_text())["quantization_config"]
    sizes = {g["weights"]["group_size"] for g in config["config_groups"].values()}
    assert len(sizes) > 1 and None in sizes
    loads_outside_as_in_memory(run, windows("tied"))
    back, stored = Decoded(run.folder), run.place.stored(run.job)
    for name, plan in run.job.plan.linears.items():
        plain = round_to_nearest(model.tensor(f"{name}.weight").bfloat16(), plan.scheme.weights)
        assert torch.equal(back.tensor(f"{name}.weight").float(), plain.dequantize())
        assert torch.equal(stored.tensor(f"{name}.weight"), plain.dequantize())
    assert "of them" in back.summary() and "W3 per row symmetric" in back.summary()


def test_the_note_says_sizes_counts_and_bits(model, tmp_path):
    run = carry_out(job_for(model, [FineQuant(bits=3)], None), tmp_path / "run")
    (note,) = [n for n in run.job.plan.notes if n.startswith("finequant chose")]
    schemes = {n: p.scheme.weights for n, p in run.job.plan.linears.items()}
    assert f"W3 g32 symmetric ({sum(s.group_size == 32 for s in schemes.values())} linears)" in note
    assert f"{bits_per_weight(schemes, model):.3f} bits per weight" in note
    mine = [t for n, t in run.tensors().items() if n.rpartition(".")[0] in schemes and "shape" not in n]
    weights = sum(model.tensor(f"{n}.weight").numel() for n in schemes)
    assert bits_per_weight(schemes, model) == pytest.approx(8 * sum(t.nbytes for t in mine) / weights)


def test_a_resumed_run_reads_its_choice_and_does_not_choose_again(model, tmp_path, monkeypatch):
    plan, kept = make_plan([FineQuant(bits=3)], model), tmp_path / "schemes.json"
    how = {"fast": torch.float32, "hidden_limit": 2**30, "progress": Progress()}
    first = settle(plan, model, None, kept, **how)
    assert kept.is_file() and first.linears != plan.linears
    monkeypatch.setattr(FineQuant, "schemes", None)
    again = settle(plan, model, None, kept, **how)
    assert again.linears == first.linears and again.notes == first.notes


def test_together_follows_the_sites_and_leaves_out_what_is_not_asked_for(model):
    names = [n for n in model.linears() if not n.endswith("k_proj")]
    groups = together(model, names)
    assert [n for g in groups for n in g] == names
    assert [len(g) for g in groups] == [2, 1, 2, 1] * 2


def test_values_between_points_lie_on_a_line_of_logarithms():
    points = [(3.0, 8.0), (3.25, 2.0), (3.5, 1.0)]
    assert between(points, 3.125) == pytest.approx(4.0)
    assert between(points, 3.25) == pytest.approx(2.0)
    assert between(points, 4.0) == 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.sampled_from([16, 32, None]), st.booleans(), st.integers(1, 40))
def test_stored_bytes_are_those_of_the_container(bits, group, symmetric, rows):
    from frugallm.formats.compressed_tensors import encode_linear
    from frugallm.formats.quantized_tensor import LinearScheme

    scheme = WeightScheme(bits=bits, group_size=group, symmetric=symmetric)
    q = round_to_nearest(random_weight(rows, 96, 0), scheme)
    tensors = encode_linear("x", q, LinearScheme(weights=scheme))
    assert scheme.stored_bytes(rows, 96) == sum(t.nbytes for n, t in tensors.items() if "shape" not in n)


@pytest.mark.parametrize("rows", [16, 37])
def test_stored_bytes_count_scales_that_are_codes_themselves(rows):
    from frugallm.formats.compressed_tensors import encode_linear
    from frugallm.formats.quantized_tensor import LinearScheme

    step = SpQR(threshold=None)
    weight, statistics = example(rows, 96, step.solve_needs)
    scheme = step.weights({"x": 96})
    assert scheme.second is not None
    tensors = encode_linear("x", step.solve(weight, scheme, statistics), LinearScheme(weights=scheme))
    assert scheme.stored_bytes(rows, 96) == sum(t.nbytes for n, t in tensors.items() if "shape" not in n)
