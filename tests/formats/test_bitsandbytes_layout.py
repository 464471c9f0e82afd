"""bitsandbytes folders: what its rules say, without the package."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finished_run import finished
from frugallm.cli.main import main
from frugallm.formats.bitsandbytes_layout import QuantState, unpack_4bit, unpack_8bit
from frugallm.formats.export import export
from frugallm.formats.packed_folder import load_packed
from frugallm.models import load, open_checkpoint
from packed_folders import damaged, edit_settings, packed_copy, read_damaged, refusal, rewrite

EIGHT = {
    "quant_method": "bitsandbytes",
    "load_in_8bit": True,
    "load_in_4bit": False,
    "llm_int8_threshold": 2.0,
}
FOUR = {
    "quant_method": "bitsandbytes",
    "load_in_8bit": False,
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
#: QLoRA, appendix E.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
UP = "model.layers.1.mlp.up_proj"
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


def packed_bytes(codes, storage):
    """Two codes a byte, the first in the high half; the bytes under another type."""
    pairs = codes + [0] * (len(codes) % 2)
    content = [16 * first + second for first, second in zip(pairs[::2], pairs[1::2])]
    size = torch.empty((), dtype=storage).itemsize
    content += [0] * (-len(content) % size)
    return torch.tensor(content, dtype=torch.uint8).view(storage)[:, None]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 41),
    size=st.sampled_from([32, 64]),
    nests=st.booleans(),
    seed=st.integers(0, 999),
    storage=st.sampled_from([torch.uint8, torch.int8, torch.bfloat16, torch.float32]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_every_entry_of_4_bits_is_decoded(rows, width, size, nests, seed, storage, dtype):
    generator = torch.Generator().manual_seed(seed)
    entries = rows * width
    blocks = -(-entries // size)
    codes = torch.randint(0, 16, (entries,), generator=generator).tolist()
    facts = {"blocksize": size, "dtype": dtype, "shape": (rows, width)}
    if nests:
        absmax = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        outer, outer_map = torch.rand(-(-blocks // 3), generator=generator), torch.linspace(-1, 1, 256)
        facts |= {"nested_blocksize": 3, "nested_dtype": "float32", "nested_offset": 0.5}
        nested = outer, outer_map
        scales = [outer_map[absmax[b].item()] * outer[b // 3] + 0.5 for b in range(blocks)]
    else:
        absmax, nested = torch.rand(blocks, generator=generator), None
        scales = list(absmax)
    state = QuantState(**facts)
    found = unpack_4bit(packed_bytes(codes, storage), NF4, absmax, state, nested)
    assert found.shape == (rows, width) and found.dtype is getattr(torch, dtype)
    for i, code in enumerate(codes):
        expected = (NF4[code] * scales[i // size]).to(found.dtype)
        assert found[i // width, i % width] == expected


def test_8_bits_are_rows_of_127ths():
    codes = torch.tensor([[127, -127, 1], [-128, 0, 64]], dtype=torch.int8)
    expected = torch.tensor([[2.54, -2.54, 0.02], [-1.28, 0.0, 0.64]])
    assert torch.allclose(unpack_8bit(codes, torch.tensor([2.54, 1.27])), expected, rtol=1e-6)


def pack_8bit(path, weight):
    scb = weight.abs().amax(1)
    codes = (weight * 127 / scb[:, None]).round().to(torch.int8)
    return {"weight": codes, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def pack_4bit(path, weight):
    """Nearest value of NF4; block maxima rounded to a map of 256 steps."""
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    outer_map, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
    outer = (absmax - offset).abs().amax()[None]
    inner = ((absmax - offset)[:, None] / outer - outer_map).abs().argmin(1)
    codes = (blocks[..., None] / absmax[:, None, None] - NF4).abs().argmin(-1)
    facts = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    facts |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    return {
        "weight": packed_bytes(codes.flatten().tolist(), torch.uint8),
        "weight.absmax": inner.to(torch.uint8),
        "weight.quant_map": NF4.clone(),
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": outer_map.clone(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(facts).encode()), dtype=torch.uint8
        ),
    }


@pytest.fixture
def eight(tiny_folder, tmp_path):
    return packed_copy(tiny_folder, tmp_path / "eight", EIGHT, pack_8bit)


@pytest.fixture
def four(tiny_folder, tmp_path):
    return packed_copy(tiny_folder, tmp_path / "four", FOUR, pack_4bit)


def test_folders_are_near_the_original_and_load(tiny_folder, eight, four):
    original = open_checkpoint(tiny_folder)
    for folder, off in ((eight, 0.01), (four, 0.12)):
        read = open_checkpoint(folder, compressed=True)
        assert read.names() == original.names()
        model, _ = load(folder)
        for name in read.names():
            weight, found = original.tensor(name), read.tensor(name)
            difference = (found - weight).norm() / weight.norm()
            assert difference < off and (difference > 0) == name.endswith("_proj.weight"), name
            assert torch.equal(read.rows(name, 3, 9), found[3:9])
            assert torch.equal(model.state_dict()[name], found)


def rounded(x, threshold):
    """LLM.int8() of one call, ``(tokens, in)``, written out."""
    found = x.clone()
    left = [c for c in range(x.shape[1]) if float(x[:, c].abs().max()) >= threshold]
    for token in range(len(x)):
        scale = max(abs(v) for v in x[token].tolist() if abs(v) < threshold) / 127
        for column in range(x.shape[1]):
            if column not in left:
                found[token, column] = round(float(x[token, column]) / scale) * scale
    return found


@pytest.mark.parametrize("threshold", [2.0, 0])
def test_8_bit_models_round_their_inputs_beside_outlier_channels(eight, threshold):
    edit_settings(eight, llm_int8_threshold=threshold)
    model, _ = load(eight)
    linear = model.get_submodule(UP)
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    assert 0 < (x.abs() >= 2).any(0).sum() < 40
    expected = rounded(x, threshold or float("inf")) @ linear.weight.T
    found = linear(x.view(2, 5, 64)).view(10, -1)
    assert (found - expected).norm() < 1e-5 * expected.norm() < 1e-2 * (x @ linear.weight.T - found).norm()


def test_a_result_of_llm_int8_comes_back(tmp_path):
    folder, values, model = finished(tmp_path, "tied", ["llm_int8:threshold=2"], stored=torch.float32)
    read = open_checkpoint(export(folder, "bitsandbytes"), compressed=True)
    for name, value in values.items():
        torch.testing.assert_close(read.tensor(name), value, rtol=1e-6, atol=0)
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(0))
    linear = load_packed(read, torch.float32).get_submodule(UP)
    torch.testing.assert_close(linear(x), model.get_submodule(UP)(x), rtol=1e-4, atol=1e-5)


def test_inspect_says_what_it_is(eight, four, capsys):
    assert main(["inspect", str(eight)]) == main(["inspect", str(four)]) == 0
    shown = capsys.readouterr().out
    assert "bitsandbytes, 8 bits, inputs rounded beside outliers from 2; 14 parts" in shown
    assert "bitsandbytes, 4 bits (nf4, nested); 14 parts" in shown


def state(**changes):
    def change(tensors):
        facts = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{UP}.weight"), "up_proj.weight is missing"),
        (lambda t: t.pop(f"{UP}.weight.absmax"), "absmax is missing"),
        (lambda t: t.pop(f"{UP}.weight.quant_map"), "quant_map is missing"),
        (lambda t: t.pop(STATE), "bitsandbytes__nf4 is missing"),
        (lambda t: t.pop(f"{UP}.weight.nested_absmax"), "nested_absmax is missing"),
        (lambda t: t.pop(f"{UP}.weight.nested_quant_map"), "nested_quant_map is missing"),
        (lambda t: t.update({STATE: t[STATE][:-3].clone()}), "cannot be read"),
        (lambda t: t.update({STATE: torch.full((9,), 255, dtype=torch.uint8)}), "cannot be read"),
        (lambda t: t.update({STATE: torch.tensor([91, 93], dtype=torch.uint8)}), "cannot be read"),
        (state(shape=[64, 96]), "up_proj.weight has shape (64, 96)"),
        (state(shape=[96, 66]), "has 3072 bytes, (96, 66) in 4 bits take 3168"),
        (state(shape=[96]), "cannot be read"),
        (state(blocksize=0), "cannot be read"),
        (state(dtype="float8"), "cannot be read"),
        (state(blocksize=32), "absmax has 96 entries, expected 192"),
        (state(nested_blocksize=None), "names no nested_blocksize"),
        (lambda t: t.update({f"{UP}.weight.quant_map": NF4[:15].clone()}), "15 entries, expected 16"),
        (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].long()}), "stored as I64"),
        (lambda t: t[f"{UP}.weight.nested_absmax"].fill_(float("nan")), "holds NaN"),
    ],
)
def test_damage_in_4_bits_is_one_line(four, change, said, capsys):
    rewrite(four, change)
    shown = refusal(capsys, "evaluate", str(four))
    assert said in shown and "model.safetensors" in shown, shown


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{UP}.SCB"), "SCB is missing"),
        (lambda t: t.pop(f"{UP}.weight"), "weight is missing"),
        (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].float()}), "stored as F32, expected I8"),
        (lambda t: t.update({f"{UP}.SCB": torch.ones(95)}), "has shape (95,), expected (96,)"),
        (lambda t: t[f"{UP}.weight_format"].fill_(2), "weight_format is 2"),
        (lambda t: [t.pop(f"{UP}.{leaf}") for leaf in ("SCB", "weight_format")], "is stored as I8"),
    ],
)
def test_damage_in_8_bits_is_one_line(eight, change, said, capsys):
    rewrite(eight, change)
    shown = refusal(capsys, "evaluate", str(eight))
    assert said in shown and "model.safetensors" in shown, shown


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"load_in_8bit": False}, "either load_in_8bit or load_in_4bit"),
        ({"load_in_4bit": True}, "either load_in_8bit or load_in_4bit"),
        ({"llm_int8_threshold": "high"}, "llm_int8_threshold is 'high'"),
        ({"llm_int8_threshold": -1}, "llm_int8_threshold is -1"),
        ({"quant_method": "aqlm"}, "already compressed"),
        ({"quant_method": None}, "already compressed"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(eight, changed, said, capsys):
    edit_settings(eight, **changed)
    shown = refusal(capsys, "inspect", str(eight))
    assert said in shown and str(eight) in shown, shown


@damaged
def test_damaged_bytes_are_read_or_refused_in_8_bits(eight, changes):
    read_damaged(eight, changes)


@damaged
def test_damaged_bytes_are_read_or_refused_in_4_bits(four, changes):
    read_damaged(four, changes)
