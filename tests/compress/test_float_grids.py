"""Weights on float grids: scales, nearest values, the column solve, what is stored, and that plain transformers reads it."""

import pytest
import torch
from shapes import moment, random_weight

from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.distillation import latent, rounded
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import fit, in_units, nearest_on, power_of_two, round_to_nearest
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.solvers import compensate, proxy_loss
from frugallm.conformance.stored_models import container_bytes, loads_outside_as_in_memory
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import ParameterError, RecipeError
from frugallm.formats.compressed_tensors import decode_linear, encode_linear, quantization_config
from frugallm.formats.engines import loads_in_transformers
from frugallm.formats.quantized_tensor import ActivationScheme, LinearScheme, WeightScheme
from frugallm.formats.rounded_inputs import round_activations
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe

SCHEMES = {
    "fp4": WeightScheme(bits=4, grid="e2m1", group_size=16),
    "mxfp4": WeightScheme(bits=4, grid="e2m1", group_size=32, scale_dtype="float8_e8m0fnu"),
    "nvfp4": WeightScheme(bits=4, grid="e2m1", group_size=16, scale_dtype="float8_e4m3fn"),
    "fp8": WeightScheme(bits=8, grid="e4m3"),
}
every = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


@every
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_what_lies_on_the_grid_stays_there_and_zeros_stay_zero(scheme, size, search):
    weight = random_weight(7, 64, 0, size)
    weight[1], weight[:, 0] = 0, 0
    q = round_to_nearest(weight, scheme, search)
    value = q.dequantize()
    assert value.isfinite().all() and (value[weight == 0] == 0).all()
    assert torch.equal(nearest_on(q, value).codes, q.codes)
    assert str(q.scale.dtype) == f"torch.{scheme.scale_dtype}"
    assert (value - weight).norm() < 0.2 * weight.norm()


@every
def test_the_plain_range_reaches_the_largest_weight_and_a_search_loses_nothing(scheme):
    weight = random_weight(9, 64, 1)
    plain, found = (round_to_nearest(weight, scheme, search) for search in ("minmax", "mse"))
    assert ((found.dequantize() - weight) ** 2).sum() <= ((plain.dequantize() - weight) ** 2).sum()
    scale = plain.scale.float() if plain.unit is None else plain.scale.float() / plain.unit
    reached = (scale * scheme.reach).repeat_interleave(scheme.columns_per_scale(64), 1)
    assert (weight.abs() <= reached * (1 + 2**-4)).all()  # but for the rounding of the scale


def reference(weight, h, q, damp):
    """GPTQ from left to right, in float64, with every level looked at."""
    scheme = q.scheme
    w, h = weight.double().clone(), h.double()
    inverse = torch.linalg.inv(h + damp * h.diagonal().mean() * torch.eye(len(h)))
    scale = (q.scale.float() if q.unit is None else q.scale.float() / q.unit).double()
    codes = torch.arange(scheme.code_range[0], scheme.code_range[1] + 1)
    values, out = scheme.values(codes).double(), torch.zeros_like(w)
    for j in range(w.shape[1]):
        s = scale[:, j // scheme.columns_per_scale(w.shape[1])]
        near = (w[:, j, None] / s[:, None] - values).abs().argmin(1)
        out[:, j] = values[near] * s
        error = w[:, j] - out[:, j]
        w[:, j + 1 :] -= torch.outer(error, inverse[j, j + 1 :] / inverse[j, j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out


@every
def test_the_column_solve_is_that_of_the_equations(scheme):
    weight, h = random_weight(24, 64, 3), moment(64, 400)
    scaled, unit = in_units(weight, scheme)
    scale, _ = fit(scaled, scheme)
    solved = compensate(scaled, h, scale, None, scheme, damp=0.01, act_order=False, block_size=16)
    ours = GPTQ(search="minmax", act_order=False).solve(weight, scheme, {"second_moment": h})
    assert torch.equal(solved.codes, ours.codes)
    assert (unit is None) == (ours.unit is None)
    differ = (ours.dequantize().double() - reference(weight, h, ours, 0.01)).abs() > 1e-6
    assert differ.float().mean() <= 2e-3  # float32 against float64: ties may fall to either side
    plain = nearest_on(ours, weight)
    assert (plain.codes != ours.codes).float().mean() > 0.03
    assert proxy_loss(weight, ours.dequantize(), h) < proxy_loss(weight, plain.dequantize(), h)


@every
def test_uncorrelated_inputs_are_rounded_to_nearest(scheme):
    weight = random_weight(17, 64, 5)
    h = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1)
    q = GPTQ(search="minmax").solve(weight, scheme, {"second_moment": h})
    assert torch.equal(q.codes, round_to_nearest(weight, scheme).codes)
    assert torch.equal(q.dequantize(), round_to_nearest(weight, scheme).dequantize())


def test_powers_of_two_are_the_next_above():
    x = torch.tensor([1.0, 1.0001, 0.75, 0.5, 3.0, 2.0**-20, 5e-39])
    assert power_of_two(x).tolist() == [1, 2, 1, 0.5, 4, 2.0**-20, 2.0**-126]


def test_the_scale_of_a_tensor_is_a_power_of_two_and_changes_no_code():
    scheme = SCHEMES["nvfp4"]
    weight = random_weight(8, 64, 2)
    weight[3] *= 30
    q = round_to_nearest(weight, scheme, "mse")
    assert q.unit is not None and torch.frexp(q.unit)[0].item() == 0.5
    assert q.scale.float().max() <= 448
    for row in range(8):
        alone = round_to_nearest(weight[row : row + 1], scheme, "mse")
        assert torch.equal(alone.dequantize(), q.rows(row, row + 1).dequantize())
    assert torch.equal(q.dequantize().bfloat16().float(), q.dequantize())  # what readers compute in bf16


# -- stored ------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("rows", [1, 5, 24])
def test_what_is_written_is_read_back_and_takes_the_bytes_it_says(scheme, rows):
    q = round_to_nearest(random_weight(rows, 64, 4), scheme)
    linear = LinearScheme(weights=scheme)
    tensors = encode_linear("a.b", q, linear)
    back = decode_linear("a.b", tensors, linear)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dequantize(), q.dequantize())
    found = sum(t.numel() * t.itemsize for t in tensors.values())
    assert found == container_bytes(linear, rows, 64)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8"])
def test_compressed_tensors_decodes_the_same_values(name):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    checkpoint = InMemory(random_model("tied"))
    plan = make_plan((RTN(grid=name, bits=8 if name == "fp8" else 4),), checkpoint)
    settings = quantization_config(plan, checkpoint.family, tied=True)
    config = QuantizationConfig.model_validate({k: v for k, v in settings.items() if k != "quant_method"})
    (group,) = config.config_groups.values()
    scheme = next(iter(plan.linears.values())).scheme
    q = round_to_nearest(random_weight(6, 96, 7), scheme.weights)
    tensors = {k.removeprefix("x."): v for k, v in encode_linear("x", q, scheme).items()}
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    if name == "fp8":  # its values are rounded to the type of the scales
        tensors["weight_scale"] = tensors["weight_scale"].float()
    assert torch.equal(compressor.decompress(tensors, group)["weight"].float(), q.dequantize())


def test_what_the_format_does_not_know_is_refused_by_its_readers():
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    checkpoint = InMemory(random_model("tied"))
    plan = make_plan((RTN(grid="fp4"),), checkpoint)
    settings = quantization_config(plan, checkpoint.family, tied=True)
    assert not loads_in_transformers(plan)
    with pytest.raises(ValidationError, match="grid"):
        QuantizationConfig.model_validate({k: v for k, v in settings.items() if k != "quant_method"})


RECIPES = [
    ["gptq:grid=mxfp4"],
    ["rtn:grid=nvfp4", "embedding"],
    ["rtn:grid=fp8,bits=8"],
    ["zeroquant_fp:activation=static", "rtn:grid=fp8,bits=8"],
    ["zeroquant_fp", "gptq:bits=4"],
    ["smoothquant:activation=token", "rtn:grid=mxfp4"],
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda steps: steps[0])
def test_plain_transformers_loads_it_to_equal_logits(recipe, tmp_path):
    checkpoint = InMemory(random_model("tied"))
    job = job_for(checkpoint, Recipe.parse(recipe).steps, windows("tied"))
    assert loads_in_transformers(job.plan)
    loads_outside_as_in_memory(carry_out(job, tmp_path / "run"), windows("tied"))


def test_linears_that_share_an_input_share_the_scale_of_a_tensor(tmp_path):
    job = job_for(InMemory(random_model("untied")), [RTN(grid="nvfp4")], None)
    tensors = carry_out(job, tmp_path / "run").tensors()
    block = "model.layers.0"
    for names in (
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
    ):
        units = {float(tensors[f"{block}.{name}.weight_global_scale"]) for name in names}
        assert len(units) == 1


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"grid": "mxfp4", "bits": 3}, "has 4 bits, not 3"),
        ({"grid": "fp8"}, "has 8 bits, not 4"),
        ({"grid": "nvfp4", "symmetric": False}, "no zero point"),
        ({"grid": "mxfp4", "group_size": 64}, "groups of 32"),
    ],
)
@pytest.mark.parametrize("method", [RTN, GPTQ])
def test_what_contradicts_the_format_is_refused(method, parameters, message):
    with pytest.raises(ParameterError, match=message):
        method(**parameters).weights({"x": 64})


def test_a_width_that_no_group_of_the_format_divides_is_refused():
    with pytest.raises(ParameterError, match="group_size 32 does not divide the 48 inputs of x"):
        RTN(grid="mxfp4").weights({"x": 48})


def test_a_type_in_which_the_result_would_not_run_is_refused_before_any_work():
    from frugallm.compression import _check_dtype

    plan = make_plan((RTN(grid="nvfp4"),), InMemory(random_model("tied")))
    _check_dtype(plan, "bf16")
    with pytest.raises(
        ParameterError, match="decodes FP4 weights to bf16, and the rest would be stored in fp16"
    ):
        _check_dtype(plan, "fp16")
    _check_dtype(make_plan((RTN(grid="fp4"),), InMemory(random_model("tied"))), "fp16")


@pytest.mark.claim
def test_what_the_formats_cost_a_model(tiny_bench):
    """The order that MR-GPTQ (arXiv 2509.23202) finds: small groups help NVFP4, scales of powers of two cost MXFP4."""
    steps = {
        "nvfp4": RTN(grid="nvfp4"),
        "int4": RTN(group_size=32),
        "mxfp4": RTN(grid="mxfp4"),
        "gptq mxfp4": GPTQ(grid="mxfp4"),
        "gptq nvfp4": GPTQ(grid="nvfp4"),
    }
    kl = {name: tiny_bench.kl(step) for name, step in steps.items()}
    assert kl["nvfp4"] < kl["int4"] < kl["mxfp4"], kl
    assert kl["gptq mxfp4"] < kl["mxfp4"] and kl["gptq nvfp4"] < kl["nvfp4"], kl


@every
def test_training_begins_where_the_weights_lie_between_codes_and_moves_their_values(scheme):
    weight = random_weight(5, 64, 8)
    q = round_to_nearest(weight, scheme)
    places = latent(weight, q)
    assert torch.equal(places.round().to(torch.int8), q.codes) and not torch.equal(places.round(), places)
    inside = places.abs() < scheme.code_range[1]
    low, high = (
        q.__class__(part(places).to(torch.int8), q.scale, None, scheme, unit=q.unit).dequantize()
        for part in (torch.floor, torch.ceil)
    )
    between = low + (places - torch.floor(places)) * (high - low)
    torch.testing.assert_close(between[inside], weight[inside], rtol=1e-4, atol=1e-6)

    moved = places.clone().requires_grad_()
    value = rounded(moved, q).dequantize()
    assert torch.equal(value, q.dequantize())
    value.sum().backward()
    assert (moved.grad[inside] > 0).all()


def test_gradients_pass_through_inputs_in_fp8():
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = round_activations(
        x, ActivationScheme(grid="e4m3", dynamic=False), {"input_scale": torch.tensor([0.01])}
    )
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_codes_of_fp4_are_trained_by_block_and_pairs_are_not(tmp_path):
    checkpoint = InMemory(random_model("tied"))
    job = job_for(
        checkpoint, Recipe.parse(["rtn:grid=mxfp4", "lkd:steps=24,rate=0.02"]).steps, windows("tied")
    )
    before = carry_out(job_for(checkpoint, [RTN(grid="mxfp4")], None), tmp_path / "before").tensors()
    after = carry_out(job, tmp_path / "after").tensors()
    for name, tensor in after.items():  # what training left as it was is kept where it came no closer
        same = torch.equal(tensor, before[name])
        assert same or name.endswith("weight_packed"), name
    with pytest.raises(RecipeError, match="there is nothing between pairs"):
        make_plan(Recipe.parse(["olive", "lkd"]).steps, checkpoint)
