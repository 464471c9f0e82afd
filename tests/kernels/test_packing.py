"""Packing loses nothing, whatever shape, grid and groups a weight has."""

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from frugallm.compress.quantize.rtn import RTN
from frugallm.formats.gguf_types import decode, encode
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.kernels.cases import LINEARS
from frugallm.kernels.gguf_codes import TYPES as GGUF_TYPES
from frugallm.kernels.gguf_codes import gguf_codes
from frugallm.kernels.packing import codes_of, in_turns, joined, pack_float, pack_weight, packable


@pytest.mark.parametrize("case", [c for c in LINEARS if not c.timed], ids=lambda case: case.name)
def test_lines_begin_on_lines_of_the_cache(case):
    weight = case.weight()
    assert weight.lines.data_ptr() % 64 == 0
    assert weight.lines.shape[-1] == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_stay_what_they_are(dtype):
    weight = torch.randn(21, 35).to(dtype)
    assert torch.equal(pack_float(weight).dequantize(), weight.float())


def stored(bits, group_size, symmetric, zero_dtype="int8", scale_dtype="bfloat16", width=96):
    scheme = WeightScheme(
        bits=bits, group_size=group_size, symmetric=symmetric, zero_dtype=zero_dtype, scale_dtype=scale_dtype
    )
    low, high = scheme.code_range
    groups = width // (group_size or width)
    codes = torch.randint(low, high + 1, (37, width), dtype=torch.int8)
    zero = None
    if not symmetric:
        zero = torch.randint(low, high + 1, (37, groups)).to(getattr(torch, zero_dtype))
        zero = zero + 0.25 if zero_dtype == "float16" else zero
    return QuantizedTensor(codes, torch.rand(37, groups).to(getattr(torch, scale_dtype)), zero, scheme)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 8, 24, 32, 96])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_stay_what_they_are(bits, group_size, symmetric):
    q = stored(bits, group_size, symmetric)
    packed = pack_weight(packable(q))
    assert packed.kind == ("int4" if bits <= 4 else "int8")
    assert torch.equal(packed.dequantize(), q.dequantize())


@pytest.mark.parametrize("scale_dtype", ["float16", "float32", "float8_e8m0fnu"])
def test_scales_of_any_type(scale_dtype):
    q = stored(4, 32, True, scale_dtype=scale_dtype)
    assert torch.equal(pack_weight(packable(q)).dequantize(), q.dequantize())


def test_float_zero_points_become_least_values():
    q = stored(4, 32, False, zero_dtype="float16")
    packed = pack_weight(packable(q))
    assert packed.has_minima
    torch.testing.assert_close(packed.dequantize(), q.dequantize(), rtol=1e-6, atol=1e-6)


def on_levels(grid, scale_dtype, group_size=32):
    """Return every code of a grid that is not the integers, with scales of many sizes."""
    two = scale_dtype == "float8_e4m3fn"
    bits = 8 if grid == "e4m3" else 4
    scheme = WeightScheme(bits=bits, grid=grid, group_size=group_size, scale_dtype=scale_dtype)
    low, high = scheme.code_range
    codes = torch.randint(low, high + 1, (20, 64), dtype=torch.int8)
    scale = (torch.rand(20, 64 // group_size) + 2.0 ** torch.randint(-9, 4, (20, 1))).to(
        getattr(torch, scale_dtype)
    )
    return QuantizedTensor(codes, scale, None, scheme, unit=torch.tensor([256.0]) if two else None)


@pytest.mark.parametrize(
    ("scale_dtype", "group_size"),
    [("float8_e8m0fnu", 32), ("float8_e4m3fn", 16), ("bfloat16", 64), ("float32", 32)],
)
def test_four_bit_floats_are_whole_numbers_of_half_a_scale(scale_dtype, group_size):
    q = on_levels("e2m1", scale_dtype, group_size)
    packed = pack_weight(packable(q))
    assert packed.kind == "int8"
    assert torch.equal(packed.dequantize(), q.dequantize())


@pytest.mark.parametrize("grid", ["e4m3", "olive"])
def test_what_is_on_no_integer_grid_is_packed_by_its_values(grid):
    q = on_levels(grid, "bfloat16")
    packed = pack_weight(packable(q))
    assert packed.kind == "float32"
    assert torch.equal(packed.dequantize(), q.dequantize())


def test_groups_that_no_kernel_has_are_packed_by_their_values():
    q = stored(4, 12, True)
    assert codes_of(q) is None
    assert torch.equal(pack_weight(packable(q)).dequantize(), q.dequantize())


def test_weights_that_share_an_input_are_one_weight():
    same = [stored(4, 32, False), stored(3, 32, False)]
    one = joined([packable(q) for q in same]).pack()
    assert one.kind == "int4"
    assert torch.equal(one.dequantize(), torch.cat([q.dequantize() for q in same]))
    others = [stored(4, 32, True), torch.randn(5, 96)]
    given = [w if isinstance(w, torch.Tensor) else packable(w) for w in others]
    dense = [w if isinstance(w, torch.Tensor) else w.dequantize() for w in others]
    assert torch.equal(joined(given), torch.cat(dense))


@pytest.mark.parametrize(
    ("forms", "group"),
    [
        ([(4, 32, True), (8, 96, True)], 32),
        ([(4, 32, True), (4, 48, False)], 16),
        ([(4, 32, False, "float16"), (6, 16, True), (8, 48, False)], 16),
    ],
)
def test_weights_in_different_forms_are_one_weight_in_codes(forms, group):
    weights = [stored(*form) for form in forms]
    one = pack_weight(joined([packable(q) for q in weights]))
    assert (one.kind, one.group) == ("int4" if len({f[0] for f in forms}) == 1 else "int8", group)
    expected = torch.cat([pack_weight(packable(q)).dequantize() for q in weights])
    assert torch.equal(one.dequantize(), expected)


def test_codes_of_two_gguf_types_are_one_weight():
    kinds = ("Q4_K", "Q6_K", "IQ4_NL")
    rows = [encode(torch.randn(20, 512), kind) for kind in kinds]
    one = pack_weight(joined([gguf_codes(kind, raw) for kind, raw in zip(kinds, rows)]))
    assert (one.kind, one.group, one.has_minima) == ("int8", 16, True)
    assert torch.equal(one.dequantize(), torch.cat([decode(raw, kind) for kind, raw in zip(kinds, rows)]))


def test_scales_that_leave_no_room_for_a_least_value_are_joined_by_their_values():
    weights = [
        packable(stored(4, 32, False, "float16")),
        packable(stored(8, 32, True, scale_dtype="float32")),
    ]
    one = joined(weights)
    assert isinstance(one, torch.Tensor)
    assert torch.equal(one, torch.cat([pack_weight(w).dequantize() for w in weights]))


def test_gate_and_up_in_turns():
    gate, up = stored(4, 32, True), stored(4, 32, True)
    packed = in_turns(joined([packable(gate), packable(up)])).pack()
    values = packed.dequantize()  # 37 rows each: three tiles each, the last one filled up
    assert torch.equal(values[:16], gate.dequantize()[:16])
    assert torch.equal(values[16:32], up.dequantize()[:16])
    assert torch.equal(values[64:69], gate.dequantize()[32:])
    assert torch.equal(values[80:85], up.dequantize()[32:])
    assert not values[69:80].any()


def test_what_a_solver_returns_can_be_packed():
    weight = torch.randn(48, 128)
    q = RTN(bits=4, group_size=64).solve(weight, WeightScheme(bits=4, group_size=64), {})
    assert torch.equal(pack_weight(packable(q)).dequantize(), q.dequantize())


def any_bytes(kind, rows=20, blocks=3):
    """Return rows of bytes as a file may hold them: every pattern of codes and scales, some not finite."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    return np.random.default_rng(size).integers(0, 256, (rows, blocks * size), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_codes_of_gguf_files_stand_for_what_the_package_reads(kind):
    raw = any_bytes(kind)
    packed = pack_weight(gguf_codes(kind, raw))
    assert packed.kind == ("int4" if kind in ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K") else "int8")
    assert packed.has_minima == (kind in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"))
    expected = dequantize(raw, GGMLQuantizationType[kind])
    assert np.isfinite(expected).mean() > 0.5
    np.testing.assert_array_equal(packed.dequantize().numpy(), expected)


def test_gguf_types_without_a_kernel():
    assert gguf_codes("IQ2_XXS", np.zeros((1, 66), np.uint8)) is None
