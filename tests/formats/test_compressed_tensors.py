import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugallm.compress.plan import make_plan
from frugallm.conformance.stored_models import container_bytes
from frugallm.conformance.trial import random_model
from frugallm.formats.compressed_tensors import container, decode_linear, encode_linear, quantization_config
from frugallm.formats.quantized_tensor import ActivationScheme, LinearScheme, QuantizedTensor, WeightScheme
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe


@st.composite
def tensors(draw, bits=None, symmetric=None):
    """Any codes of any width of a grid, odd rows and columns included."""
    bits = draw(st.integers(2, 8)) if bits is None else bits
    symmetric = draw(st.booleans()) if symmetric is None else symmetric
    rows, columns, groups = draw(st.integers(1, 37)), draw(st.integers(1, 21)), draw(st.integers(1, 3))
    width = columns * groups
    scheme = WeightScheme(bits=bits, symmetric=symmetric, group_size=None if groups == 1 else columns)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    low, high = scheme.code_range
    codes = torch.randint(low, high + 1, (rows, width), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).bfloat16()
    zero = (
        None
        if symmetric
        else torch.randint(low, high + 1, (rows, groups), generator=generator, dtype=torch.int8)
    )
    return QuantizedTensor(codes, scale, zero, scheme)


def assert_same(a, b):
    assert torch.equal(a.codes, b.codes) and a.codes.dtype == b.codes.dtype
    assert torch.equal(a.scale, b.scale) and a.scale.dtype == b.scale.dtype
    assert (a.zero is None) == (b.zero is None)
    assert a.zero is None or (torch.equal(a.zero, b.zero) and a.zero.dtype == b.zero.dtype)
    assert torch.equal(a.dequantize(), b.dequantize())


@settings(max_examples=80, deadline=None)
@given(tensors())
def test_packing_loses_nothing_and_takes_the_bytes_it_says(q):
    scheme = LinearScheme(weights=q.scheme)
    stored = encode_linear("a.b", q, scheme)
    assert_same(decode_linear("a.b", stored, scheme), q)
    assert all(name.startswith("a.b.weight_") and tensor.is_contiguous() for name, tensor in stored.items())
    found = sum(t.numel() * t.itemsize for t in stored.values())
    assert found == container_bytes(scheme, *q.codes.shape)


@settings(max_examples=40, deadline=None)
@given(tensors())
def test_packed_codes_are_an_unsigned_little_endian_bit_stream(q):
    packed = encode_linear("x", q, LinearScheme(weights=q.scheme))["x.weight_packed"]
    bits = q.scheme.bits
    for row, words in zip(q.codes[:3].tolist(), packed[:3].tolist()):
        stream = sum((word % 2**32) << (32 * i) for i, word in enumerate(words))
        codes = [(stream >> (bits * i)) % 2**bits - 2 ** (bits - 1) for i in range(len(row))]
        assert codes == row


@settings(max_examples=30, deadline=None)
@given(tensors(bits=8, symmetric=True), st.booleans())
def test_plain_containers_lose_nothing(q, dynamic):
    for scheme, table in (
        (LinearScheme(weights=q.scheme, activations=ActivationScheme(dynamic=dynamic)), False),
        (LinearScheme(weights=q.scheme), True),
    ):
        inputs = {"input_scale": torch.tensor([0.5])} if scheme.static_inputs else {}
        stored = encode_linear("x", q, scheme, inputs, table=table)
        assert ("x.input_scale" in stored) == scheme.static_inputs
        assert stored["x.weight"].dtype is torch.int8
        assert_same(decode_linear("x", stored, scheme, table=table), q)


@pytest.mark.parametrize("rounded_inputs", [False, True])
def test_float_zero_points_lie_beside_the_codes_as_they_are(rounded_inputs):
    weights = WeightScheme(bits=8, symmetric=False, group_size=8, zero_dtype="float16")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (5, 24), generator=generator).to(torch.int8)
    scale, zero = (
        torch.rand(5, 3, generator=generator).bfloat16(),
        torch.randn(5, 3, generator=generator).half(),
    )
    q = QuantizedTensor(codes, scale, zero, weights)
    scheme = LinearScheme(weights=weights, activations=ActivationScheme() if rounded_inputs else None)
    stored = encode_linear("x", q, scheme)
    assert (
        torch.equal(stored["x.weight_zero_point"], zero)
        and stored["x.weight_zero_point"].dtype is torch.float16
    )
    assert_same(decode_linear("x", stored, scheme), q)
    wanted = (codes.view(5, 3, 8).double() - zero.double()[..., None]) * scale.double()[..., None]
    torch.testing.assert_close(q.dequantize().double(), wanted.view(5, 24), rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(tensors(), st.data())
def test_some_rows_are_those_rows(q, data):
    start = data.draw(st.integers(0, len(q.codes) - 1))
    stop = data.draw(st.integers(start + 1, len(q.codes)))
    assert torch.equal(q.rows(start, stop).dequantize(), q.dequantize()[start:stop])


@pytest.mark.parametrize(
    ("scheme", "table", "name"),
    [
        (LinearScheme(weights=WeightScheme(bits=4)), False, "pack-quantized"),
        (LinearScheme(weights=WeightScheme(bits=8)), False, "pack-quantized"),
        (LinearScheme(weights=WeightScheme(bits=8), activations=ActivationScheme()), False, "int-quantized"),
        (LinearScheme(weights=WeightScheme(bits=8)), True, "naive-quantized"),
        (LinearScheme(weights=WeightScheme(bits=4)), True, "pack-quantized"),
    ],
)
def test_containers(scheme, table, name):
    assert container(scheme, table=table) == name


def config_of(kind, *steps):
    checkpoint = InMemory(random_model(kind))
    plan = make_plan(Recipe.parse(steps).steps, checkpoint)
    return quantization_config(plan, checkpoint.family, tied=kind == "tied")


def test_the_commonest_scheme_is_targeted_by_class_and_exceptions_by_name():
    steps = ["gptq:bits=4,skip=[*.down_proj]", "rtn:bits=8,only=[*.0.*down_proj]", "embedding"]
    config = config_of("tied", *steps)
    groups = list(config["config_groups"].values())
    assert [g["weights"]["num_bits"] for g in groups] == [8, 8, 4]
    assert groups[-1]["targets"] == ["Linear"]
    assert groups[1]["targets"] == ["model.layers.0.mlp.down_proj"]
    assert groups[0]["targets"] == [r"re:model\.embed_tokens$", r"re:lm_head$"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["model.layers.1.mlp.down_proj"]


def test_an_uncompressed_head_is_ignored():
    assert config_of("untied", "rtn")["ignore"] == ["lm_head"]
    assert config_of("untied", "rtn", "embedding")["ignore"] == []
    assert config_of("untied", "rtn")["format"] == "pack-quantized"


@pytest.mark.parametrize(
    "steps", [["rtn"], ["gptq:bits=3", "embedding"], ["smoothquant:token=[*.o_proj]"], ["embedding"]]
)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_config_is_one_that_compressed_tensors_reads(kind, steps):
    from compressed_tensors.quantization import QuantizationConfig

    config = config_of(kind, *steps)
    read = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "quant_method"})
    assert len(read.config_groups) == len(config["config_groups"])
