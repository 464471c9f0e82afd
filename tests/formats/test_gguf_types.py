"""Block types of GGUF: packed as the gguf package unpacks, never worse than its own plain choice, blind to no weight."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from frugallm.formats import gguf_types as types
from frugallm.formats.gguf_types import TYPES, block_size, decode, encode, fitting_type

SEARCHED = [kind for kind in TYPES if kind not in types.BY_PACKAGE]
ENCODED_THERE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def weights(rows, width, seed=0, scale=0.05):
    """Return weights with uneven rows and a few outliers, as real ones have them."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, width, generator=g) * scale * (0.5 + torch.rand(rows, 1, generator=g))
    return torch.where(torch.rand(rows, width, generator=g) < 0.01, 4 * w, w)


def whole(low, high, *shape, seed=0):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def halves(n, seed=0):
    return weights(1, n, seed)[0].half()


def read(packed, kind):
    return gguf.quants.dequantize(packed.numpy(), Kind[kind])


def same(got, wanted):
    np.testing.assert_array_equal(got, wanted.numpy())


N = 37


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "IQ4_NL"])
def test_four_bits_are_packed_as_the_package_reads_them(kind):
    d, m, q = halves(N), halves(N, 1), whole(0, 15, N, 32)
    if kind == "Q4_1":
        same(read(types.pack_nibbles([d, m], q), kind), d.float()[:, None] * q + m.float()[:, None])
    else:
        values = q - 8 if kind == "Q4_0" else torch.tensor(gguf.quants.IQ4_NL.kvalues)[q]
        same(read(types.pack_nibbles([d], q), kind), d.float()[:, None] * values)


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
def test_five_bits_are_packed_as_the_package_reads_them(kind):
    d, m, q = halves(N), halves(N, 1), whole(0, 31, N, 32)
    if kind == "Q5_1":
        same(read(types.pack_five([d, m], q), kind), d.float()[:, None] * q + m.float()[:, None])
    else:
        same(read(types.pack_five([d], q), kind), d.float()[:, None] * (q - 16))


@pytest.mark.parametrize(
    ("kind", "pack", "parts", "scales", "codes"),
    [
        ("Q2_K", types.pack_q2_k, 16, 15, 3),
        ("Q4_K", types.pack_q4_k, 8, 63, 15),
        ("Q5_K", types.pack_q5_k, 8, 63, 31),
    ],
)
def test_parts_with_minima_are_packed_as_the_package_reads_them(kind, pack, parts, scales, codes):
    d, m = halves(N), halves(N, 1)
    s, b, q = whole(0, scales, N, parts), whole(0, scales, N, parts, seed=1), whole(0, codes, N, 256)
    step, below = ((v.float()[:, None] * k)[..., None] for v, k in ((d, s), (m, b)))
    same(read(pack(d, m, s, b, q), kind), (step * q.view(N, parts, -1) - below).view(N, -1))


@pytest.mark.parametrize(
    ("kind", "pack", "scale", "code"), [("Q3_K", types.pack_q3_k, 32, 4), ("Q6_K", types.pack_q6_k, 128, 32)]
)
def test_signed_parts_are_packed_as_the_package_reads_them(kind, pack, scale, code):
    d, s, q = halves(N), whole(-scale, scale - 1, N, 16), whole(-code, code - 1, N, 256)
    same(read(pack(d, s, q), kind), ((d.float()[:, None] * s)[..., None] * q.view(N, 16, 16)).view(N, -1))


@pytest.mark.parametrize("kind", types.BY_PACKAGE)
def test_types_that_leave_little_choice_are_the_packages(kind):
    w = weights(5, 96)
    theirs = gguf.quants.quantize(w.numpy(), Kind[kind])
    assert encode(w, kind).tobytes() == theirs.tobytes()
    assert encode(w, kind).shape == (5, 96 // block_size(kind)[0] * block_size(kind)[1])


@pytest.mark.parametrize("kind", ENCODED_THERE)
def test_bytes_are_the_packages_where_its_grid_holds_every_value(kind):
    """On such values the plain choice has no error, so both must store it: scale, minimum and all codes."""
    bits = int(kind[1])
    q = whole(0, 2**bits - 1, 64, 32)
    q[:, 0], q[:, 1] = 0, 2**bits - 1
    d = halves(64).float().abs()[:, None] + 0.01
    w = d.half().float() * (q - 2 ** (bits - 1))
    ours, theirs = encode(w, kind), gguf.quants.quantize(w.numpy(), Kind[kind])
    same(gguf.quants.dequantize(ours, Kind[kind]), w)
    if kind.endswith("_0"):
        assert np.array_equal(ours, theirs)
    else:
        assert np.array_equal(ours[:, 4:], theirs[:, 4:]) and np.array_equal(ours[:, :2], theirs[:, :2])


@pytest.mark.parametrize("kind", ENCODED_THERE)
def test_no_block_is_worse_than_the_packages(kind):
    w = weights(8, 256)
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), Kind[kind]), Kind[kind]))
    ours = decode(encode(w, kind), kind)
    errors = [(v - w).view(-1, 32).square().sum(-1) for v in (ours, theirs)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()


@pytest.mark.parametrize("kind", SEARCHED)
def test_error_is_that_of_a_grid_of_so_many_bits(kind):
    """A step of the range over ``2^b`` codes errs by a twelfth of its square; scales in few bits add a little."""
    w = weights(16, 512)
    bits, part = int(kind.removeprefix("I")[1]), 16 if kind in ("Q2_K", "Q3_K", "Q6_K") else 32
    step = 2 * w.view(-1, part).abs().amax(-1) / 2**bits
    error = (decode(encode(w, kind), kind) - w).square().sum()
    assert 0.3 < error / (part * step.square() / 12).sum() < 1.1


def test_the_nearest_value_of_the_table_is_found():
    x = torch.linspace(-140, 130, 5000)
    table = torch.tensor(gguf.quants.IQ4_NL.kvalues, dtype=torch.float32)
    nearest = (x[:, None] - table).abs().amin(-1)
    assert torch.equal((table[types.nearest_code(x.clone())] - x).abs(), nearest)


def test_more_bits_err_less():
    w = weights(8, 512)
    error = {kind: float((decode(encode(w, kind), kind) - w).square().sum()) for kind in TYPES}
    assert error["F32"] == 0
    for order in (["F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"], ["Q5_0", "Q4_0"]):
        assert [error[k] for k in order] == sorted(error[k] for k in order)
    assert error["IQ4_NL"] < error["Q4_0"] and error["Q4_K"] < error["Q4_0"]


@pytest.mark.parametrize("kind", SEARCHED)
def test_importance_moves_the_error_to_where_it_matters_less(kind):
    w = weights(16, 512)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(3)) ** 6 * 100
    plain, weighed = (decode(encode(w, kind, i), kind) - w for i in (None, importance))
    assert ((weighed.square() * importance).sum()) < 0.97 * (plain.square() * importance).sum()
    assert plain.square().sum() < weighed.square().sum()
    assert np.array_equal(encode(w, kind, torch.ones(512)), encode(w, kind))
    assert np.array_equal(encode(w, kind, torch.zeros(512)), encode(w, kind))


@pytest.mark.parametrize("kind", TYPES)
def test_rows_are_independent_and_memory_is_cut_into_pieces(kind, monkeypatch):
    w = weights(7, 256)
    together = encode(w, kind)
    monkeypatch.setattr(types, "_ENTRIES_AT_ONCE", 512)
    assert np.array_equal(encode(w, kind), together)
    assert np.array_equal(encode(w[[4, 1]], kind), together[[4, 1]])


@pytest.mark.parametrize("kind", TYPES)
def test_zeros_and_tiny_and_large_values_come_back_finite(kind):
    w = torch.zeros(4, 256)
    w[1], w[2, 3], w[3] = 1e-9, 6e4, -60000.0
    got = decode(encode(w, kind), kind)
    assert got.isfinite().all() and (got[0] == 0).all() and got[1].abs().max() < 1e-6
    assert torch.allclose(got[3], w[3], rtol=0.2 if kind == "MXFP4" else 0.15)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SEARCHED), st.integers(0, 10**6), st.floats(1e-3, 1e3), st.sampled_from([1.0, -1.0]))
def test_a_constant_block_is_kept_to_rounding(kind, seed, size, sign):
    got = decode(encode(torch.full((1, 256), sign * size), kind), kind)
    assert torch.allclose(got, torch.full((1, 256), sign * size), rtol=0.07)


def test_rows_that_a_block_does_not_divide_fall_back_as_in_llama_cpp():
    assert fitting_type("Q4_K", 512) == "Q4_K"
    found = {kind: fitting_type(kind, 576) for kind in K_TYPES}
    assert found == {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    assert {fitting_type(kind, 100) for kind in TYPES} == {"F16", "F32", "BF16"}
    assert fitting_type("F32", 7) == "F32"
