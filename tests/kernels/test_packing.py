"""Packing loses nothing, whatever shape, grid and groups a weight has."""

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from frugallm.compress.quantize.rtn import RTN
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.kernels.cases import LINEARS
from frugallm.kernels.gguf_codes import TYPES, gguf_codes
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


def test_what_is_on_no_integer_grid_is_packed_by_its_values():
    scheme = WeightScheme(bits=4, grid="e2m1", group_size=32)
    q = QuantizedTensor(
        torch.randint(-7, 8, (20, 64), dtype=torch.int8), torch.rand(20, 2).bfloat16(), None, scheme
    )
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
    others = [stored(4, 32, True), stored(8, 96, True), torch.randn(5, 96)]
    given = [w if isinstance(w, torch.Tensor) else packable(w) for w in others]
    dense = [w if isinstance(w, torch.Tensor) else w.dequantize() for w in others]
    assert torch.equal(joined(given), torch.cat(dense))


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


@pytest.mark.parametrize("kind", TYPES)
def test_codes_of_gguf_files(kind):
    weight = np.random.default_rng(0).standard_normal((20, 96)).astype(np.float32)
    quantized = quantize(weight, GGMLQuantizationType[kind])
    packed = pack_weight(gguf_codes(kind, quantized))
    expected = dequantize(quantized, GGMLQuantizationType[kind])
    assert packed.kind == ("int4" if "4" in kind else "int8")
    torch.testing.assert_close(packed.dequantize(), torch.from_numpy(expected), rtol=1e-6, atol=1e-7)


def test_gguf_types_without_a_kernel():
    assert gguf_codes("Q6_K", np.zeros((1, 210), np.uint8)) is None
