"""Float grids against their definition: every value from its bits, the nearest by looking at all of them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugallm.formats.levels import (
    LARGEST,
    last_code,
    levels,
    nearest_codes,
    nearest_values,
    values_of,
)
from frugallm.formats.quantized_tensor import ActivationScheme, WeightScheme
from frugallm.formats.rounded_inputs import round_activations, static_scale

EXPONENTS = {"e2m1": (2, 1), "e4m3": (4, 3)}


def magnitudes(grid):
    """Return the magnitudes of all bit patterns, by the formula of IEEE 754 floats."""
    exponent, mantissa = EXPONENTS[grid]
    bias = 2 ** (exponent - 1) - 1
    found = []
    for bits in range(2 ** (exponent + mantissa)):
        e, m = bits >> mantissa, bits & (2**mantissa - 1)
        found.append(
            2.0 ** (1 - bias) * m / 2**mantissa if e == 0 else 2.0 ** (e - bias) * (1 + m / 2**mantissa)
        )
    return found[:-1] if grid == "e4m3" else found  # its last pattern is no number


@pytest.mark.parametrize("grid", EXPONENTS)
def test_the_values_are_those_of_the_bits(grid):
    expected = magnitudes(grid)
    assert levels(grid).tolist() == [-v for v in expected[:0:-1]] + expected
    assert max(expected) == LARGEST[grid]
    assert last_code(grid) == len(expected) - 1 <= 127


@pytest.mark.parametrize("grid", EXPONENTS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_nearest_value_is_the_nearest_and_ties_go_to_the_even_code(grid, data):
    values = magnitudes(grid)
    middle = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    x = data.draw(st.one_of(st.sampled_from(middle), st.sampled_from(values), st.floats(0, 500, width=32)))
    distance = [abs(v - x) for v in values]
    near = [code for code, d in enumerate(distance) if d == min(distance)]
    expected = near[0] if len(near) == 1 else next(code for code in near if code % 2 == 0)
    for sign in (1, -1):
        code = nearest_codes(torch.tensor([sign * x]), grid)
        assert code.item() == sign * expected
        assert values_of(code, grid).item() == sign * values[expected]


@pytest.mark.parametrize("grid", EXPONENTS)
def test_both_ways_to_the_nearest_value_are_one(grid):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 4000)
    x = torch.cat([x, (levels(grid)[1:] + levels(grid)[:-1]) / 2, levels(grid)])
    assert torch.equal(nearest_values(x, grid), values_of(nearest_codes(x, grid), grid))


def test_fp4_is_that_of_compressed_tensors():
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    x = torch.cat([torch.linspace(-7, 7, 1001), (levels("e2m1")[1:] + levels("e2m1")[:-1]) / 2])
    assert torch.equal(nearest_values(x, "e2m1"), cast_to_fp4(x.clone()))


@pytest.mark.parametrize("dynamic", [True, False])
def test_inputs_in_fp8_are_those_of_compressed_tensors(dynamic):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64)
    scheme = ActivationScheme(grid="e4m3", dynamic=dynamic)
    args = QuantizationArgs(
        num_bits=8, type="float", strategy="token" if dynamic else "tensor", dynamic=dynamic
    )
    scale = static_scale(x[:1].abs().amax((0, 1)) / 2, scheme)  # values beyond it are cut off
    parameters = {} if dynamic else {"input_scale": scale}
    zero = None
    if dynamic:
        scale, zero = compute_dynamic_scales_and_zp(x, args, None)
    theirs = fake_quantize(x, scale, zero, args)
    ours = round_activations(x, scheme, parameters)
    assert torch.equal(ours, theirs)
    assert ours.isfinite().all() and not torch.equal(ours, x)
    assert dynamic or ours.abs().max() == 448 * scale


def test_a_float_grid_has_its_bits_and_no_zero_point():
    with pytest.raises(ValueError, match="4 bits"):
        WeightScheme(bits=8, grid="e2m1")
    with pytest.raises(ValueError, match="symmetric"):
        WeightScheme(bits=4, grid="e2m1", symmetric=False)
    with pytest.raises(ValueError, match="8 bits"):
        ActivationScheme(bits=4, grid="e4m3")
