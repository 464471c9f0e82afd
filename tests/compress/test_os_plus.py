"""OS+ against its equations, written out in float64, and its shift on models with and without biases."""

import pytest
import torch
from shapes import random_weight

from frugallm.compress.plan import Plan, make_plan
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.os_plus import OSPlus, best_scale, rounded_product, scales
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.smoothquant import SmoothQuant
from frugallm.conformance.families import variant
from frugallm.conformance.parts import rewrite_keeps_the_logits, rewritten_blocks
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import RecipeError
from frugallm.formats.quantized_tensor import ActivationScheme, WeightScheme
from frugallm.models.in_memory import InMemory
from frugallm.walk.walk import Walk

WIDTH = 40


def inputs_with_outliers(seed=0, tokens=200):
    """Inputs of which three channels are much larger than the rest, all of them centered."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=generator)
    x[:, :3] *= torch.tensor([40.0, 20.0, 10.0])
    return x


def extremes_of(x):
    return torch.stack([x.amin(0), x.amax(0)])


def nearest(values, extent, bits):
    """Round ``values`` to nearest, ``extent`` on ``(2^bits - 1) / 2`` codes; the extreme lies between two of them.

    So codes are chosen in float32, as they are stored, and what they stand for is float64.
    """
    step = extent.float() / ((2**bits - 1) / 2)
    codes = (values.float() / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.double() * step.double()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_of_codes_is_that_of_the_rounded_values(bits, dynamic):
    x, weight = inputs_with_outliers(), random_weight(11, WIDTH, 1)
    scheme, inputs = WeightScheme(bits=bits, scale_dtype="float32"), ActivationScheme(bits=6, dynamic=dynamic)
    extent = x.double().abs().amax(-1, keepdim=True) if dynamic else x.double().abs().max()
    rows = nearest(weight.double(), weight.double().abs().amax(1, keepdim=True), bits)
    wanted = nearest(x.double(), extent, 6) @ rows.T
    found = rounded_product(x, weight, None if dynamic else x.abs().amax(0), scheme, inputs)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_thresholds_go_from_the_largest_range_to_the_smallest():
    extremes = torch.tensor([[-8.0, -1.0, -0.5], [2.0, 4.0, 0.1]])
    found = list(scales(extremes, 5))
    assert torch.equal(found[0], torch.ones(3))
    for s, threshold in zip(found, [8.0, 4.0, 2.0, 1.0, 0.5]):
        torch.testing.assert_close(s, torch.tensor([8.0, 4.0, 0.5]).div(threshold).clamp(min=1))


def test_a_channel_that_never_comes_sets_no_end():
    extremes = torch.tensor([[-8.0, 0.0, -1e-9], [2.0, 0.0, 0.0]])
    found = list(scales(extremes, 4))
    assert found[-1].isfinite().all() and float(found[-1][0]) == pytest.approx(1000)
    assert torch.equal(torch.stack(list(scales(torch.zeros(2, 3), 4))), torch.ones(1, 3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_scale_is_the_one_that_leaves_the_output_closest(dynamic):
    weight, x = random_weight(24, WIDTH, 2), inputs_with_outliers(3)
    ranges, losses, wanted = x.abs().amax(0), [], []
    for step in range(30):
        t = float(ranges.max()) * (float(ranges.min()) / float(ranges.max())) ** (step / 29)
        s = (ranges / t).clamp(min=1)
        moved, scaled = x / s, weight * s
        extent = moved.abs().amax(-1, keepdim=True) if dynamic else moved.abs().max()
        rows = nearest(scaled, scaled.abs().amax(1, keepdim=True), 6)
        wanted.append(s)
        losses.append(
            float((nearest(moved, extent, 6) @ rows.T - x.double() @ weight.double().T).square().sum())
        )
    best = min(range(30), key=losses.__getitem__)
    assert 0 < best < 29 and losses[best] < 0.5 * losses[0]  # neither end, so the test can fail
    scheme, inputs = WeightScheme(bits=6, scale_dtype="float32"), ActivationScheme(bits=6, dynamic=dynamic)
    found = best_scale(weight, x, extremes_of(x), scheme, inputs, 30)
    torch.testing.assert_close(found, wanted[best], rtol=1e-5, atol=0)


def rewritten(step, model, tokens, scratch):
    """Return the blocks of ``model`` before and after ``step``, and what the inputs of the first one were and are."""
    checkpoint = InMemory(model)
    plan = Plan(rewrites=(step,), linears={}, tables={}, left_alone=())
    walk = Walk(checkpoint, plan, tokens, scratch, fast=torch.float32, stored=torch.float32)
    next(rewritten_blocks(step, walk))
    block = walk.load(0)
    before = walk.observe(block, frozenset({"extremes"}))
    step.rewrite(block, walk.observe(block, step.rewrite_needs))
    return block, before, walk.observe(block, frozenset({"extremes"}))


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "gpt2"])
def test_where_there_are_biases_channels_are_centered_and_none_leaves_the_threshold(name, tmp_path):
    tokens = torch.randint(67, (6, 48), generator=torch.Generator().manual_seed(7))
    block, before, after = rewritten(OSPlus(bits=6, input_bits=6), variant(name), tokens, tmp_path)
    shifted = 0
    for site in block.sites:
        if not block.takes_shift(site):
            continue
        shifted += 1
        low, high = after[site.name]["extremes"]
        (low_before, high_before), range_before = (
            before[site.name]["extremes"],
            before[site.name]["extremes"].abs().max(),
        )
        assert float((low_before + high_before).abs().max()) > 0.1 * range_before  # they were not centered
        if site.writer_kind == "norm" or block.heads.repeats == 1:
            assert float((low + high).abs().max()) <= 1e-3 * float(high.max())
        assert float(high.max()) < range_before
    assert shifted == 3  # what attention reads and puts out, and what the feed-forward reads


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "gpt_neox, one after the other", "llama", "qwen3"])
def test_the_logits_stay_in_every_kind_of_block(name, tmp_path):
    tokens = torch.randint(67, (6, 48), generator=torch.Generator().manual_seed(7))
    rewrite_keeps_the_logits(OSPlus(bits=6, input_bits=6), InMemory(variant(name)), tokens, tmp_path)


def test_nothing_is_shifted_where_a_bias_is_missing(tmp_path):
    def shifting(name):
        checkpoint = InMemory(variant(name))
        block = Walk(checkpoint, Plan((), {}, {}, ()), None, tmp_path, fast=torch.float32).load(0)
        return [site.name for site in block.sites if block.takes_shift(site)]

    assert shifting("llama") == shifting("mixtral") == []
    assert shifting("qwen2, tied") == []  # values have a bias, the output projection none
    assert shifting("gpt_neox, one after the other") == ["mlp.dense_h_to_4h"]  # attention without biases
    assert shifting("opt") == ["self_attn.q_proj", "self_attn.out_proj", "fc1"]  # ReLU lets no shift pass
    checkpoint = InMemory(variant("llama"))
    block = Walk(checkpoint, Plan((), {}, {}, ()), None, tmp_path, fast=torch.float32).load(0)
    with pytest.raises(ValueError, match=r"no bias .* self_attn\.q_proj"):
        block.shift_site(block.sites[0], torch.ones(96))


def test_one_threshold_is_no_scale_at_all(tmp_path):
    """Where nothing can be shifted either, that is the baseline, byte for byte."""
    model, tokens = random_model("tied"), windows("tied")

    def tensors(step, out):
        return carry_out(job_for(InMemory(model), [step], tokens), out).tensors()

    one = tensors(OSPlus(steps=1), tmp_path / "one")
    none = tensors(OSPlus(sites=()), tmp_path / "none")
    some = tensors(OSPlus(), tmp_path / "some")
    assert all(torch.equal(one[name], none[name]) for name in none)
    assert not all(torch.equal(some[name], none[name]) for name in none)


def test_a_later_step_rounds_the_weights_and_the_inputs_stay_rounded():
    checkpoint = InMemory(random_model("tied"))
    plan = make_plan([OSPlus(input_bits=6), GPTQ(bits=4)], checkpoint)
    assert plan.rewrites == (OSPlus(input_bits=6),)
    for linear in plan.linears.values():
        assert isinstance(linear.solver, GPTQ) and linear.scheme.weights.bits == 4
        assert linear.scheme.activations == ActivationScheme(bits=6, dynamic=False)
    with pytest.raises(RecipeError, match="both scale the input"):
        make_plan([SmoothQuant(), OSPlus()], checkpoint)
    with pytest.raises(RecipeError, match="after rounding"):
        make_plan([RTN(), OSPlus()], checkpoint)
