import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import moment, random_weight, schemes

from frugallm.compress.quantize.grids import (
    _candidates,
    decode,
    diagonal_blocks,
    encode,
    fit,
    round_to_nearest,
)
from frugallm.formats.quantized_tensor import WeightScheme

SIZES = st.sampled_from([1e-30, 1e-4, 1.0, 300.0, 1e30])


@settings(max_examples=60, deadline=None)
@given(schemes(), st.sampled_from([1, 3, 7]), st.integers(0, 99), SIZES, st.sampled_from(["minmax", "mse"]))
def test_what_lies_on_the_grid_stays_there(chosen, rows, seed, size, search):
    scheme, width = chosen
    weight = random_weight(rows, width, seed, size)
    scale, zero = fit(weight, scheme, search)
    codes = encode(weight, scale, zero, scheme)
    low, high = scheme.code_range
    assert codes.dtype == torch.int8 and low <= codes.min() and codes.max() <= high
    value = decode(codes, scale, zero)
    assert value.isfinite().all()
    assert torch.equal(encode(value, scale, zero, scheme), codes)
    assert torch.equal(decode(codes, scale, zero), round_to_nearest(weight, scheme, search).dequantize())


@settings(max_examples=60, deadline=None)
@given(schemes(), st.integers(0, 99), st.sampled_from([1e-4, 1.0, 300.0]))
def test_inside_the_range_the_error_is_at_most_half_a_step(chosen, seed, size):
    scheme, width = chosen
    weight = random_weight(3, width, seed, size)
    q = round_to_nearest(weight, scheme)
    step = q.scale.float().abs().repeat_interleave(scheme.columns_per_scale(width), 1)
    zero = 0 if q.zero is None else q.zero.float().repeat_interleave(scheme.columns_per_scale(width), 1)
    low, high = (step * (code - zero) for code in scheme.code_range)
    error = (q.dequantize() - weight).abs()
    inside = (weight >= low) & (weight <= high)
    assert inside.float().mean() > 0.7 or width < 8
    assert (error <= step * 0.5 * (1 + 1e-5) + 1e-12)[inside].all()
    # outside it is the distance to the end of the range: the half step by which the range may miss,
    # and what rounding of scale and zero point adds
    assert (error <= step * (1.5 + 2 ** (scheme.bits - 8))).all()


@given(schemes(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_zeros_stay_zero_in_any_company(chosen, seed):
    scheme, width = chosen
    weight = random_weight(4, width, seed)
    weight[1] = 0
    weight[:, 0] = 0
    q = round_to_nearest(weight, scheme)
    assert (q.scale != 0).all() and q.scale.isfinite().all()
    assert (q.dequantize()[weight == 0] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.7, -0.7, 1e-20, -3e4])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_a_constant_group_is_nearly_exact(symmetric, value, search):
    scheme = WeightScheme(bits=4, symmetric=symmetric, group_size=16, scale_dtype="float32")
    weight = torch.full((3, 32), value)
    stored = round_to_nearest(weight, scheme, search).dequantize()
    assert ((stored - weight).abs() <= abs(value) / 14).all()  # half a step of the symmetric range


@given(schemes(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_scales_are_values_of_the_stored_type(chosen, seed):
    scheme, width = chosen
    scale, zero = fit(random_weight(3, width, seed), scheme, "mse")
    assert str(scale.dtype) == f"torch.{scheme.scale_dtype}"
    assert scale.shape == (3, width // scheme.columns_per_scale(width))
    assert (zero is None) == scheme.symmetric
    if zero is not None:
        assert zero.shape == scale.shape and zero.dtype == torch.int8
        assert zero.min() >= scheme.code_range[0] and zero.max() <= scheme.code_range[1]


@given(schemes(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_search_loses_nothing_against_the_plain_range(chosen, seed):
    scheme, width = chosen
    weight = random_weight(5, width, seed)
    importance = torch.rand(width, generator=torch.Generator().manual_seed(seed)) + 0.01
    errors = [
        ((round_to_nearest(weight, scheme, search, importance).dequantize() - weight) ** 2 * importance).sum()
        for search in ("mse", "minmax")
    ]
    assert errors[0] <= errors[1] * (1 + 1e-4) + 1e-12


def test_the_signed_extreme_uses_the_extra_code():
    scheme = WeightScheme(bits=4, scale_dtype="float32")
    weight = torch.tensor([[8.0, -7, 6, 5, 4, 3, 2, 1, 0]])  # exact if 8 lies on code -8 of a negative scale
    q = round_to_nearest(weight, scheme, "mse")
    assert q.scale.item() == -1
    assert torch.equal(q.dequantize(), weight)
    assert not torch.equal(round_to_nearest(weight, scheme).dequantize(), weight)


def test_importance_decides_where_the_error_goes():
    scheme = WeightScheme(bits=2)
    weight = torch.cat([torch.full((1, 31), 0.9), torch.full((1, 1), 4.0)], 1)
    heavy = torch.ones(32)
    heavy[-1] = 1e4
    light = torch.ones(32)
    light[-1] = 1e-4
    error = {
        name: (round_to_nearest(weight, scheme, "mse", cost).dequantize() - weight).abs()[0]
        for name, cost in {"heavy": heavy, "light": light}.items()
    }
    assert error["heavy"][-1] < error["light"][-1]
    assert error["heavy"][0] >= error["light"][0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, None])
def test_blocks_of_a_second_moment_choose_by_the_error_of_the_output(symmetric, group):
    scheme = WeightScheme(bits=3, symmetric=symmetric, group_size=group, scale_dtype="float32")
    weight, h = random_weight(12, 48, 2), moment(48, 300)
    size = scheme.columns_per_scale(48)
    scale, zero = fit(weight, scheme, "mse", diagonal_blocks(h, scheme))
    found = decode(encode(weight, scale, zero, scheme), scale, zero).double()
    tried = [decode(encode(weight, s, z, scheme), s, z).double() for s, z in _candidates(weight, scheme)]
    best = set()
    for g in range(48 // size):
        part = slice(g * size, (g + 1) * size)
        block = h[part, part].double()
        losses = [((t - weight)[:, part] @ block * (t - weight)[:, part]).sum(1) for t in tried]
        best |= set(torch.stack(losses).argmin(0).tolist())
        ours = ((found - weight)[:, part] @ block * (found - weight)[:, part]).sum(1)
        torch.testing.assert_close(ours, torch.stack(losses).amin(0), rtol=1e-4, atol=0)
    assert len(best) > 3
