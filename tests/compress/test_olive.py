"""Outlier-victim pairs against the rules written out for one pair at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import random_weight

from frugallm.compress.quantize.grids import nearest_on
from frugallm.compress.quantize.olive import Olive, _clipped, _without_victims
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import ParameterError
from frugallm.formats.compressed_tensors import container, decode_linear, encode_linear
from frugallm.formats.decoded import scheme_of
from frugallm.formats.levels import nearest_codes, nearest_values, values_of
from frugallm.formats.packed_folder import load_packed
from frugallm.formats.quantized_tensor import ActivationScheme, LinearScheme, QuantizedTensor, WeightScheme
from frugallm.formats.rounded_inputs import round_activations
from frugallm.models.in_memory import InMemory

OUTLIERS = (12, 16, 24, 32, 48, 64, 96)
SCHEME = WeightScheme(bits=4, grid="olive")


def pair(a, b):
    """Return codes and values of one pair, as the paper's figure says it."""

    def outlier(x):
        rank = min(range(7), key=lambda k: (abs(abs(x) - OUTLIERS[k]), k))
        return (rank + 1, OUTLIERS[rank]) if x > 0 else (-rank - 1, -OUTLIERS[rank])

    def normal(x):
        code = int(max(-7, min(7, round(x))))
        return code, code

    large = [abs(x) > 9.5 for x in (a, b)]
    if large[0] and (not large[1] or abs(a) >= abs(b)):
        code, value = outlier(a)
        return (code, -8), (value, 0)
    if large[1]:
        code, value = outlier(b)
        return (-8, code), (0, value)
    (code_a, value_a), (code_b, value_b) = normal(a), normal(b)
    return (code_a, code_b), (value_a, value_b)


NUMBERS = st.one_of(st.floats(-130, 130, width=32), st.sampled_from([0.0, 9.5, -9.5, 14.0, 12.0, 7.4, 200.0]))


@settings(max_examples=300, deadline=None)
@given(NUMBERS, NUMBERS)
def test_codes_and_values_of_a_pair(a, b):
    codes, values = pair(a, b)
    x = torch.tensor([[a, b]])
    found = nearest_codes(x, "olive")
    assert found.tolist() == [list(codes)]
    assert values_of(found.to(torch.int8), "olive").tolist() == [list(values)]
    assert torch.equal(nearest_values(nearest_values(x, "olive"), "olive"), nearest_values(x, "olive"))


def test_without_outliers_it_is_integers_cut_off_at_seven():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) * 3.16
    assert torch.equal(nearest_codes(x, "olive"), x.round().clamp(-7, 7).int())


def heavy(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * 0.1
    return torch.where(torch.rand(rows, width, generator=generator) < 0.01, 8 * weight, weight)


def test_it_is_stored_in_four_bits_and_read_back():
    q = Olive().solve(heavy(9, 64), SCHEME, {})
    scheme = LinearScheme(weights=SCHEME)
    assert container(scheme) == "pack-quantized"
    tensors = encode_linear("x", q, scheme)
    assert tensors["x.weight_packed"].shape == (9, 64 * 4 // 32)
    back = decode_linear("x", tensors, scheme)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dequantize(), q.dequantize())
    assert (q.codes == -8).any()


def test_pruned_outliers_and_victims_stay_as_many_zeros():
    q = Olive().solve(heavy(9, 64), SCHEME, {})
    mask = torch.rand(9, 64, generator=torch.Generator().manual_seed(1)) < 0.3
    value = q.with_zeros(mask).dequantize()
    assert torch.equal(value, q.dequantize().masked_fill(mask, 0.0))


def test_the_search_takes_the_best_range_of_every_row():
    weight, steps = heavy(12, 96, 3), 9
    q = Olive(steps=steps).solve(weight, SCHEME, {})
    found = (q.dequantize() - weight).square().sum(1)
    widest = (weight.mean(1).abs() + 3 * weight.std(1, correction=0)) / 7
    for p in torch.linspace(0.75, 2.5, steps).tolist():
        scale = (widest * p).bfloat16()[:, None]
        tried = nearest_on(QuantizedTensor(q.codes, scale, None, SCHEME), weight).dequantize()
        assert (found <= (tried - weight).square().sum(1) * (1 + 1e-5)).all()


def test_heavy_tails_lose_less_than_with_clipping_and_others_the_one_code_that_marks_victims():
    marked = (7.5 / 7) ** 2  # 15 values in the place of 16
    for weight, low, high in ((heavy(32, 256), 0.1, 0.8), (random_weight(32, 256, 1), 1.0, 1.05 * marked)):
        errors = []
        for pairs in (True, False):
            step = Olive(pairs=pairs)
            q = step.solve(weight, step.weights({"x": 256}), {})
            errors.append(float((q.dequantize() - weight).square().sum()))
        assert low < errors[0] / errors[1] <= high


def test_inputs_are_rounded_in_pairs_with_the_scale_that_loses_least():
    x = heavy(40, 64, 5)
    step = Olive(activation="static")
    scheme = step.activations("x")
    assert scheme == ActivationScheme(bits=4, grid="olive", dynamic=False)
    parameters = step.input_parameters(scheme, {"sample": x})
    assert parameters["input_scale"].shape == (1,)
    rounded = round_activations(x, scheme, parameters)
    scale = parameters["input_scale"].item()
    for a, b, got_a, got_b in torch.cat([x.view(-1, 2), rounded.view(-1, 2)], 1)[:200].tolist():
        assert (got_a / scale, got_b / scale) == pytest.approx(pair(a / scale, b / scale)[1], abs=1e-4)
    widest = (x.mean().abs() + 3 * x.std(correction=0)) / 7
    for p in (0.75, 1.0, 1.5, 2.0, 2.5):
        other = round_activations(x, scheme, {"input_scale": (widest * p).reshape(1)})
        assert (rounded - x).square().sum() <= (other - x).square().sum() * 1.02


def test_an_odd_width_makes_no_pairs():
    with pytest.raises(ParameterError, match="the 65 inputs of x make no pairs"):
        Olive().weights({"x": 65})


def test_a_folder_is_read_back_to_the_values_that_were_stored(tmp_path):
    checkpoint = InMemory(random_model("tied"))
    job = job_for(checkpoint, [Olive()], windows("tied"))
    run = carry_out(job, tmp_path / "run")
    (run.folder / "manifest.json").write_text("{}")
    from frugallm.formats.decoded import Decoded
    from frugallm.formats.stored import model_in_memory

    reader = Decoded(run.folder)
    assert Decoded.only_read_here(run.folder)
    assert {scheme_of(g).weights.grid for g in reader.settings["config_groups"].values()} == {"olive"}
    ours, read = model_in_memory(run.place.stored(run.job)), load_packed(reader, torch.float32)
    tokens = windows("tied")
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, read(tokens).logits)


def test_victims_are_the_neighbors_of_outliers():
    weight = torch.full((1, 40), 0.1)
    weight[0, 4], weight[0, 11] = 9.0, -9.0
    changed = _without_victims(weight)
    assert (changed == 0).nonzero()[:, 1].tolist() == [5, 10]
    assert _clipped(weight).abs().max() < 9 and torch.equal(_clipped(weight)[0, :4], weight[0, :4])
