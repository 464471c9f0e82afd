"""LLM.int8() against bitsandbytes' arithmetic, written out with integers, and against its degenerate cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import random_weight

from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.llm_int8 import LLMInt8
from frugallm.compress.quantize.smoothquant import SmoothQuant
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import RecipeError
from frugallm.formats.engines import engines_for, loads_in_transformers
from frugallm.formats.quantized_tensor import ActivationScheme
from frugallm.formats.rounded_inputs import round_activations
from frugallm.models.in_memory import InMemory

METHOD = LLMInt8()


def stored(weight):
    return METHOD.solve(weight, METHOD.weights({}), {})


def bitsandbytes(x, weight, threshold):
    """``int8_vectorwise_quant`` of both sides, the integer product, and the outlier columns beside it, in float64."""
    x, weight = x.double().reshape(-1, x.shape[-1]), weight.double()
    row = weight.abs().amax(1, keepdim=True)
    codes_w = torch.round(weight * 127 / row)
    outliers = x.abs() >= threshold
    columns = outliers.any(0)
    rest = x.masked_fill(outliers, 0)
    token = rest.abs().amax(1, keepdim=True)
    codes_x = torch.round(rest * (127 / token.clamp(min=1e-300)))
    codes_x[:, columns] = 0
    product = (codes_x @ codes_w.T) * token * row.T / 127**2
    return product + x[:, columns] @ (codes_w[:, columns] * row / 127).T


def inputs(seed, shape, outliers):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for channel in torch.randperm(shape[-1], generator=generator)[:outliers]:
        x[..., channel] *= 8
    return x


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.sampled_from([(1, 24), (9, 24), (2, 5, 24)]), st.integers(0, 4))
def test_products_are_those_of_bitsandbytes(seed, shape, outliers):
    x, weight = inputs(seed, shape, outliers), random_weight(7, 24, seed)
    q = stored(weight)
    ours = round_activations(x, METHOD.activations("x"), {}).double() @ q.dequantize().double().T
    theirs = bitsandbytes(x, weight, 6.0)
    assert (ours.reshape(-1, 7) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_codes_of_weights_reach_127_on_either_side_and_no_further():
    q = stored(random_weight(16, 48, 0))
    assert (q.codes.abs().amax(1) == 127).all() and q.scale.dtype is torch.float32
    assert torch.equal(stored(torch.zeros(2, 8)).dequantize(), torch.zeros(2, 8))


def test_without_outliers_every_channel_is_rounded_per_token():
    x = inputs(1, (6, 32), 3)
    far = round_activations(x, ActivationScheme(outliers=1e9), {})
    scale = x.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(far, torch.round(x / scale) * scale)
    assert not torch.equal(far, x)
    assert LLMInt8(threshold=0).activations("x") == ActivationScheme()  # as in bitsandbytes, 0 turns it off


def test_where_everything_is_an_outlier_nothing_is_rounded():
    x = inputs(2, (6, 32), 3)
    assert torch.equal(round_activations(x, ActivationScheme(outliers=1e-9), {}), x)


def test_an_outlier_in_one_token_keeps_the_channel_of_all_and_leaves_their_scales():
    x = inputs(3, (4, 16), 0).clamp(-3, 3)
    x[2, 5] = 50.0
    x[1, 5] = 5.0  # below the threshold: kept, but it sets its token's scale
    rounded = round_activations(x, ActivationScheme(outliers=6.0), {})
    assert torch.equal(rounded[:, 5], x[:, 5])
    scale = x[1].abs().max() / 127
    assert scale == 5 / 127
    others = [c for c in range(16) if c != 5]
    torch.testing.assert_close(rounded[1, others], torch.round(x[1, others] / scale) * scale)
    plain = round_activations(x, ActivationScheme(outliers=1e9), {})
    assert (rounded - x)[2].abs().max() < 0.2 * (plain - x)[2].abs().max()


@pytest.fixture(scope="module")
def model():
    return InMemory(random_model("tied"))


def test_the_folder_says_the_threshold_and_transformers_refuses_it(model, tmp_path):
    from transformers import AutoModelForCausalLM

    run = carry_out(job_for(model, [METHOD], None), tmp_path / "run")
    assert not loads_in_transformers(run.job.plan)
    assert any(
        "bitsandbytes" in row.note for row in engines_for(run.job.plan) if row.engine == "transformers"
    )
    assert '"outliers": 6.0' in (run.folder / "config.json").read_text()
    with pytest.raises(ValueError, match="outliers"):
        AutoModelForCausalLM.from_pretrained(str(run.folder))


def test_it_composes_with_smoothing_before_and_other_steps_beside(model):
    plan = make_plan([SmoothQuant(), METHOD], model)
    assert {p.solver.name() for p in plan.linears.values()} == {"llm_int8"}
    assert {p.scheme.label() for p in plan.linears.values()} == {
        "W8 per row symmetric, A8 per token beside outliers from 6"
    }
    beside = make_plan([LLMInt8(only=("*.mlp.*",)), GPTQ(skip=("*.mlp.*",))], model)
    assert {p.solver.name() for p in beside.linears.values()} == {"llm_int8", "gptq"}
    for steps, reason in (
        ([METHOD, SmoothQuant()], "scale rounded weights"),
        ([METHOD, GPTQ()], "rounded twice"),
    ):
        with pytest.raises(RecipeError, match=reason):
            make_plan(steps, model)


def test_later_linears_see_inputs_rounded_beside_outliers(model, tmp_path):
    """The walk rounds as the result will be run: GPTQ after it in the block sees other inputs."""
    steps = [LLMInt8(threshold=0.5, only=("*.self_attn.*",)), GPTQ(only=("*.mlp.*",))]
    plain = [LLMInt8(threshold=0, only=("*.self_attn.*",)), GPTQ(only=("*.mlp.*",))]
    one, other = (
        carry_out(job_for(model, s, windows("tied")), tmp_path / str(i)) for i, s in enumerate((steps, plain))
    )
    name = "model.layers.1.mlp.up_proj.weight_packed"
    assert not torch.equal(one.tensors()[name], other.tensors()[name])
