"""Codes that are carried over, not fitted again."""

import pytest
import torch

from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.formats.gguf_transcode import transcode, type_for
from frugallm.formats.gguf_types import block_size, decode
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme

WIDTH = 192


def stored(bits, *, symmetric=True, group_size=None, dtype="bfloat16", rows=24):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, WIDTH, generator=g) * 0.1
    scheme = WeightScheme(bits=bits, symmetric=symmetric, group_size=group_size, scale_dtype=dtype)
    return round_to_nearest(weight, scheme)


@pytest.mark.parametrize("group_size", [32, 64, 96, None])
@pytest.mark.parametrize(
    ("bits", "symmetric", "kinds"),
    [
        (4, True, ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]),
        (3, True, ["Q4_0", "Q4_1", "Q5_0", "Q8_0"]),
        (2, False, ["Q4_0", "Q4_1", "Q5_0", "Q8_0"]),
        (4, False, ["Q5_0", "Q8_0"]),
        (5, True, ["Q5_0", "Q8_0"]),
        (6, False, ["Q8_0"]),
        (8, True, ["Q8_0"]),
    ],
)
def test_values_are_the_same_to_the_last_bit(bits, symmetric, kinds, group_size):
    q = stored(bits, symmetric=symmetric, group_size=group_size)
    for kind in kinds:
        rows = transcode(q, kind)
        assert rows.shape == (24, WIDTH // 32 * block_size(kind)[1])
        assert torch.equal(decode(rows, kind), q.dequantize()), kind


def test_minima_that_float16_lacks_are_rounded_and_most_are_found_elsewhere():
    """Bfloat16 scale times a run's first multiple may need 12 digits, float16 has 11."""
    q = stored(4, symmetric=False, group_size=32, rows=1000)
    got, wanted = decode(transcode(q, "Q4_1"), "Q4_1"), q.dequantize()
    step = q.scale.float().repeat_interleave(32, 1)
    assert ((got - wanted).abs() <= 2**-7 * step).all()
    exact = (got == wanted).view(-1, 32).all(1).float().mean()
    first = (-8 - q.zero.float()) * q.scale.float()
    assert exact > (first.half().float() == first).float().mean()


@pytest.mark.parametrize(
    ("q", "kind"),
    [
        (stored(5), "Q4_0"),
        (stored(8), "Q5_0"),
        (stored(8), "Q4_1"),
        (stored(8, symmetric=False), "Q8_0"),
        (stored(4, group_size=16), "Q4_0"),
        (stored(4, group_size=48), "Q4_0"),
        (stored(4), "Q4_K"),
        (stored(4), "F16"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_not_forced(q, kind):
    if kind == "Q8_0":
        q = QuantizedTensor(q.codes, q.scale, torch.full_like(q.zero, -100), q.scheme)
        q.codes[0, 0] = 127
    assert transcode(q, kind) is None


def test_float_zero_points_are_left_to_whoever_fits_anew():
    q = stored(4, symmetric=False, group_size=32)
    assert transcode(q, "Q5_0") is not None
    floating = QuantizedTensor(q.codes, q.scale, q.zero.half() + 0.25, q.scheme)
    assert all(transcode(floating, kind) is None for kind in ("Q4_1", "Q5_0", "Q8_0"))


@pytest.mark.parametrize("scale", [1e-9, 1e30, 1e-6])
def test_scales_beyond_float16_do_not_pass_for_equal(scale):
    q = stored(4)
    q = QuantizedTensor(q.codes, torch.full_like(q.scale, scale), None, q.scheme)
    assert not torch.equal(decode(transcode(q, "Q4_0"), "Q4_0"), q.dequantize())


def test_float32_scales_are_rounded_but_codes_stay():
    q = stored(8, dtype="float32")
    rows = transcode(q, "Q8_0")
    blocks = rows.reshape(-1, 34)[:, 2:].view("int8").reshape(24, WIDTH)
    assert torch.equal(torch.from_numpy(blocks.copy()), q.codes)
    assert not torch.equal(decode(rows, "Q8_0"), q.dequantize())
    torch.testing.assert_close(decode(rows, "Q8_0"), q.dequantize(), rtol=2**-11, atol=0)


@pytest.mark.parametrize(
    ("bits", "kind"), [(2, "Q4_0"), (4, "Q4_0"), (5, "Q5_0"), (6, "Q8_0"), (8, "Q8_0"), (16, "BF16")]
)
def test_the_type_for_so_many_bits(bits, kind):
    assert type_for(bits) == kind


@pytest.mark.parametrize("group_size", [32, 64])
def test_fp4_with_powers_of_two_is_mxfp4_to_the_last_bit(group_size):
    fields = {"grid": "e2m1", "scale_dtype": "float8_e8m0fnu"}
    weight = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 192)
    q = round_to_nearest(weight, WeightScheme(bits=4, group_size=group_size, **fields))
    assert torch.equal(decode(transcode(q, "MXFP4"), "MXFP4"), q.dequantize())
    assert transcode(q, "Q4_0") is None
    real = round_to_nearest(weight, WeightScheme(bits=4, group_size=32, grid="e2m1"))
    assert transcode(real, "MXFP4") is None
