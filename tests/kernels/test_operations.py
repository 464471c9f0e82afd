"""Every native path computes what the reference computes, whatever stands beside a row and however many threads."""

import pytest
import torch

from frugallm.kernels import library, operations, reference
from frugallm.kernels.cases import ATTENTIONS, LINEARS

PATHS = library.usable_paths()
pytestmark = pytest.mark.skipif(not PATHS, reason="the native kernels are not built")
SMALL = [case for case in LINEARS if not case.timed]
MANY = 135  # rows for which codes of 4 bits are unpacked beforehand


def apart(found, expected):
    """Return the squared error relative to the expected square."""
    return float(((found - expected).double() ** 2).sum() / ((expected.double() ** 2).sum() + 1e-30))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_products_are_those_of_the_reference_bit_for_bit(case, path):
    weight = case.weight()
    for rows in (1, 2, 5, 12, 31, MANY):
        x = case.inputs(rows)
        assert torch.equal(operations.linear(x, weight, path), reference.linear(x, weight)), rows


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_rounding_inputs_by_groups_costs_little_even_beside_an_outlier(case):
    weight, x = case.weight(), case.inputs(31)
    x[0] = x[2]  # the outlier takes its own group with it
    exact = x.double() @ weight.dequantize().double().T + weight.bias[: case.rows]
    limit = {"float32": 1e-12, "bf16": 1e-4}.get(case.kind, 2e-4)
    assert apart(reference.linear(x, weight).double(), exact) < limit


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", SMALL[::3], ids=lambda case: case.name)
def test_a_row_depends_neither_on_rows_beside_it_nor_on_threads(case, path):
    weight, x = case.weight(), case.inputs(29)
    together = operations.linear(x, weight, path, threads=2)
    alone = torch.cat([operations.linear(row, weight, path) for row in x.split(1)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("rows", [7, 31, MANY])
@pytest.mark.parametrize("case", [c for c in SMALL if 16 < c.rows <= 32], ids=lambda case: case.name)
@pytest.mark.parametrize("how", reference.GATED)
@pytest.mark.parametrize("path", PATHS)
def test_gate_times_up_beside_the_product(path, how, case, rows):
    weight, x = case.weight(), case.inputs(rows)  # two tiles: gate and up, the latter of fewer rows
    gate, up = torch.nn.functional.pad(operations.linear(x, weight, path), (0, 32 - case.rows)).chunk(2, 1)
    found = operations.linear(x, weight, path, epilogue=how)
    assert torch.equal(found, operations.gated_mul(gate, up, how, path))
    assert apart(found, reference.GATED[how](gate, up)) < 1e-12


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_rows_of_a_table_are_what_is_stored(case, path):
    weight = case.weight()
    rows = torch.tensor([case.rows - 1, 0, case.rows // 2])
    assert torch.equal(operations.embed(rows, weight, path), weight.dequantize()[rows])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [1, 16, 100, 576])
def test_norm_and_rotation_are_those_of_the_reference_bit_for_bit(width, path):
    x, gain = 30 * torch.randn(5, width), torch.randn(width)
    assert torch.equal(operations.rms_norm(x, gain, 1e-5, path), reference.rms_norm(x, gain, 1e-5))
    heads = torch.randn(5, 2 * width)
    cos, sin = torch.randn(2, 5, width)
    assert torch.equal(operations.rotate(heads, cos, sin, path), reference.rotate(heads, cos, sin))


@pytest.mark.parametrize("how", reference.GATED)
@pytest.mark.parametrize("path", PATHS)
def test_activations_are_as_near_as_float32_allows_and_the_same_on_every_path(path, how):
    gate = torch.cat((torch.linspace(-100, 100, 4001), torch.randn(1000), torch.tensor([0.0, 1e30, -1e4])))
    up = torch.full_like(gate, 0.5)
    found = operations.gated_mul(gate, up, how, path)
    exact = reference.GATED[how](gate.double(), up.double())
    rtol = 2e-6 if how == "gelu_mul" else 1e-6  # what is raised to a power was rounded more often
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=1e-15)
    assert torch.equal(found, operations.gated_mul(gate, up, how, "generic"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [c for c in ATTENTIONS if not c.timed], ids=lambda case: case.name)
def test_attention_over_blocks(case, path):
    queries, keys, values, positions, table = case.tensors()
    scale = case.head**-0.5

    def attend(which, path=path):
        places = positions[which]
        return operations.attend(queries[which], keys, values, places, scale, case.window, path, table)

    together = attend(slice(None))
    expected = reference.attend(queries, keys, values, positions, scale, case.window)
    assert apart(together, expected) < 1e-5  # weights are rounded to bf16 before they are multiplied
    assert torch.equal(together, attend(slice(None), "generic"))
    alone = torch.cat([attend(slice(i, i + 1)) for i in range(case.queries)])
    assert torch.equal(together, alone)


def test_attention_does_not_read_what_its_query_may_not_see():
    case = ATTENTIONS[2]
    queries, keys, values, positions, table = case.tensors()
    first = slice(0, 1)

    def attend(keys, values):
        return operations.attend(queries[first], keys, values, positions[first], 0.1, 0, PATHS[-1], table)

    expected = attend(keys, values)
    later = int(positions[0]) + 1
    keys[later:], values[later:] = torch.nan, torch.nan
    assert torch.equal(attend(keys, values), expected)
