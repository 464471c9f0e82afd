"""What lies beside codes: kept columns and entries, and scales that are codes themselves, stored and read back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finished_run import finished
from frugallm.cli.main import main
from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.grids import fit_second_level
from frugallm.conformance.stored_models import container_bytes
from frugallm.conformance.trial import random_model
from frugallm.formats.compressed_tensors import decode_linear, encode_linear, quantization_config
from frugallm.formats.decoded import Decoded, scheme_of
from frugallm.formats.engines import engines_for, loads_in_transformers
from frugallm.formats.extras import LEAVES, Columns, Entries
from frugallm.formats.quantized_tensor import (
    ActivationScheme,
    LinearScheme,
    QuantizedTensor,
    WeightScheme,
    first_level,
)
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe

SECOND = WeightScheme(bits=3, symmetric=False, group_size=16, zero_dtype="float16")


@st.composite
def weights(draw, bits=None):
    """Codes with kept columns, kept entries, both or neither, with or without a second level."""
    rows, columns, groups = draw(st.integers(1, 40)), draw(st.integers(2, 21)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    width = columns * groups
    kinds = draw(st.sampled_from([(), ("columns",), ("entries",), ("entries", "columns")]))
    level = draw(st.booleans())
    scheme = WeightScheme(
        bits=bits or draw(st.integers(2, 8)),
        symmetric=False,
        group_size=None if groups == 1 else columns,
        scale_dtype="float32" if level else "bfloat16",
        zero_dtype="float16",
        extras=kinds,
        second=SECOND if level else None,
    )
    low, high = scheme.code_range
    codes = torch.randint(low, high + 1, (rows, width), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    zero = torch.randn(rows, groups, generator=generator)
    q = QuantizedTensor(codes, scale.bfloat16(), zero.half(), scheme)
    if level:
        second = fit_second_level(scale.T, SECOND), fit_second_level(zero.T, SECOND)
        q = QuantizedTensor(codes, *first_level(second, rows), scheme, second=second)
    values = torch.randn(rows, width, generator=generator).half().float()
    for kind in kinds:
        if kind == "columns":
            index = torch.randperm(width, generator=generator)[: draw(st.integers(0, width))]
            q = q.plus(Columns.of(index, values.T[index]))
        else:
            q = q.plus(Entries.of(torch.rand(rows, width, generator=generator) < 0.2, values))
    return q


@settings(max_examples=60, deadline=None)
@given(weights())
def test_what_is_stored_is_read_back_and_takes_the_bytes_it_says(q):
    scheme = LinearScheme(weights=q.scheme)
    stored = encode_linear("a.b", q, scheme)
    assert all(name.startswith("a.b.weight_") and tensor.is_contiguous() for name, tensor in stored.items())
    back = decode_linear("a.b", stored, scheme)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dequantize(), q.dequantize())
    assert torch.equal(back.scale, q.scale) and torch.equal(back.zero, q.zero)
    sizes = {name.removeprefix("a.b."): tensor.nbytes for name, tensor in stored.items()}
    beside = sum(size for leaf, size in sizes.items() if leaf in LEAVES)
    if q.scheme.second is not None:
        assert sum(sizes.values()) - beside == q.scheme.stored_bytes(*q.codes.shape) + 16  # of the shape
    assert sum(sizes.values()) == container_bytes(scheme, *q.codes.shape) + beside


@settings(max_examples=15, deadline=None)
@given(weights(bits=8))
def test_unpacked_codes_have_all_of_it_too(q):
    scheme = LinearScheme(weights=q.scheme, activations=ActivationScheme())
    stored = encode_linear("a.b", q, scheme)
    assert stored["a.b.weight"].dtype is torch.int8
    assert torch.equal(decode_linear("a.b", stored, scheme).dequantize(), q.dequantize())


@settings(max_examples=60, deadline=None)
@given(weights(), st.data())
def test_rows_are_rows_and_can_be_stored_from_a_whole_group_on(q, data):
    rows = len(q.codes)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    part = q.rows(start, stop)
    assert torch.equal(part.dequantize(), q.dequantize()[start:stop])
    if q.scheme.second is not None:
        assert (part.second is None) == (start % 16 > 0)
    if q.scheme.second is None or part.second is not None:
        scheme = LinearScheme(weights=q.scheme)
        back = decode_linear("x", encode_linear("x", part, scheme), scheme)
        assert torch.equal(back.dequantize(), part.dequantize())


def test_kept_values_take_the_place_of_what_codes_stand_for():
    weight = torch.arange(12.0).view(3, 4)
    columns = Columns.of(torch.tensor([3, 1]), torch.tensor([[9.0, 9, 9], [7, 7, 7]]))
    assert columns.index.tolist() == [1, 3]
    assert columns.apply(weight.clone()).tolist() == [[0, 7, 2, 9], [4, 7, 6, 9], [8, 7, 10, 9]]
    mask = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    entries = Entries.of(mask, -weight)
    assert entries.counts.tolist() == [1, 0, 2] and entries.columns.tolist() == [1, 0, 3]
    assert entries.counts.dtype is entries.columns.dtype is torch.uint16
    assert entries.apply(weight.clone()).tolist() == [[0, -1, 2, 3], [4, 5, 6, 7], [-8, 9, 10, -11]]


@pytest.mark.parametrize(
    "steps", [["owq"], ["spqr"], ["owq:only=[*.mlp.*]", "rtn:bits=4,only=[*.self_attn.*]"]]
)
def test_config_says_it_and_engines_say_that_only_we_read_it(steps):
    checkpoint = InMemory(random_model("tied"))
    plan = make_plan(Recipe.parse(steps).steps, checkpoint)
    config = quantization_config(plan, checkpoint.family, tied=True)
    read = {
        scheme_of(group).weights.model_copy(update={"scale_dtype": "x"})
        for group in config["config_groups"].values()
    }
    planned = {
        linear.scheme.weights.model_copy(update={"scale_dtype": "x"}) for linear in plan.linears.values()
    }
    assert read == planned
    assert not loads_in_transformers(plan)
    refusals = [row for row in engines_for(plan) if row.engine == "transformers"]
    assert refusals and all(row.seen == "no" and "beside the codes" in row.note for row in refusals)


@pytest.mark.parametrize(
    ("step", "at_least", "at_most"),
    [
        # Codes, one scale and one zero point a row; columns as asked for, rounded to whole ones; 16 bytes of shape.
        ("owq:bits=4,extra_bits=1", 5.1, 5.7),
        ("owq:bits=4,extra_bits=0", 4.1, 4.7),
        ("spqr:threshold=null", 3.6, 3.8),
        ("spqr:threshold=0.05", 4.0, 20.0),
    ],
)
def test_inspect_counts_everything(step, at_least, at_most, tmp_path, capsys):
    folder, _, _ = finished(tmp_path, "tied", [step])
    bits = Decoded(folder).bits_per_weight()
    assert at_least <= bits <= at_most
    assert main(["inspect", str(folder)]) == 0
    assert f"{bits:.3f} bits a weight in the compressed linears" in capsys.readouterr().out
