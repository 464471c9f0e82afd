"""GPTQ folders: what the published rules of the layout say, without the toolkit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from frugallm.cli.main import main
from frugallm.errors import ModelError
from frugallm.formats.gptq_layout import GPTQFolder, unpack
from frugallm.formats.quantized_tensor import QuantizedTensor
from frugallm.models import load, open_checkpoint
from packed_folders import (
    damaged,
    edit_settings,
    gptq_parts,
    packed_copy,
    read_damaged,
    refusal,
    rewrite,
    scatter,
)

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


@st.composite
def linears(draw):
    """Codes, zero points and scales of a linear, and the group of each column."""
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    size, groups = draw(st.sampled_from([32, 64])), draw(st.integers(1, 3))
    rows, width = 32 * draw(st.integers(1, 2)), size * groups
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    codes = torch.randint(0, 2**bits, (rows, width), generator=generator)
    symmetric = draw(st.booleans())
    zeros = (
        torch.full((rows, groups), 2 ** (bits - 1))
        if symmetric
        else torch.randint(1, 2**bits, (rows, groups), generator=generator)
    )
    scales = torch.rand(rows, groups, generator=generator).half() + 0.1
    order = torch.randperm(width, generator=generator) if draw(st.booleans()) else torch.arange(width)
    return bits, codes, zeros, scales, order // size


@settings(max_examples=60, deadline=None)
@given(linears(), st.sampled_from(["gptq", "gptq_v2"]), st.booleans())
def test_every_width_version_and_column_order_is_decoded(linear, version, names_groups):
    bits, codes, zeros, scales, group = linear
    parts = gptq_parts(codes, zeros, scales, bits, version=version)
    in_order = torch.equal(group, group.sort().values)
    g_idx = group.int() if names_groups or not in_order else None
    found = unpack(
        parts["qweight"], parts["qzeros"], parts["scales"], g_idx, bits, less_one=version == "gptq"
    )
    assert isinstance(found, QuantizedTensor) == in_order
    values = found.dequantize() if in_order else found
    for row in range(0, len(codes), 7):
        for column in range(0, codes.shape[1], 5):
            at = row, group[column]
            exact = float(scales[at]) * (int(codes[row, column]) - int(zeros[at]))
            assert float(values[row, column]) == exact
    assert in_order is False or found.scheme.symmetric == bool((zeros == 2 ** (bits - 1)).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_0_borrows_from_the_next_field(bits):
    """GPTQModel takes one from each field of the packed word at once."""
    zeros = torch.tensor([[0, 3, 0, 0, 1, 2, 3, 2] * 4]).T
    parts = gptq_parts(torch.zeros(32, 32).int(), zeros, torch.ones(32, 1), bits, version="gptq_v2")
    ones = sum(1 << shift for shift in range(0, 32, bits))
    stored = torch.tensor(
        [(word - ones + 2**31) % 2**32 - 2**31 for word in parts["qzeros"].flatten().tolist()],
        dtype=torch.int32,
    ).view_as(parts["qzeros"])
    found = unpack(parts["qweight"], stored, parts["scales"], None, bits, less_one=True)
    assert torch.equal(found.dequantize()[:, :1], -zeros.float())


def pack_4bit(path, weight):
    """Round to symmetric codes in groups of 32."""
    grouped = weight.view(len(weight), -1, 32)
    scales = (grouped.abs().amax(-1) / 7.5).half()
    codes = (grouped / scales[..., None].float()).round().clamp(-8, 7).int() + 8
    zeros = torch.full(scales.shape, 8)
    return gptq_parts(codes.view(weight.shape), zeros, scales, 4, version="gptq")


@pytest.fixture
def packed(tiny_folder, tmp_path):
    return packed_copy(tiny_folder, tmp_path / "packed", SETTINGS, pack_4bit)


def test_a_folder_is_the_model_that_its_codes_stand_for(tiny_folder, packed):
    original, read = open_checkpoint(tiny_folder), open_checkpoint(packed, compressed=True)
    assert read.names() == original.names()
    model, tokenizer = load(packed)
    for name in read.names():
        weight = original.tensor(name)
        if name.endswith("_proj.weight"):
            grouped = weight.view(len(weight), -1, 32)
            scale = (grouped.abs().amax(-1, keepdim=True) / 7.5).half().float()
            weight = ((grouped / scale).round().clamp(-8, 7) * scale).view(weight.shape)
        assert torch.equal(read.tensor(name), weight), name
        assert torch.equal(read.rows(name, 3, 9), weight[3:9]), name
        assert torch.equal(model.state_dict()[name], weight), name
    assert tokenizer.decode(tokenizer("the")["input_ids"]) == "the"


def test_the_tensors_of_a_linear_may_lie_in_different_files(packed, tmp_path, capsys):
    whole = open_checkpoint(packed, compressed=True)
    values = {name: whole.tensor(name) for name in whole.names()}
    scatter(packed, ["one.safetensors", "model-2.safetensors", "3.safetensors"])
    read = open_checkpoint(packed, compressed=True)
    assert all(torch.equal(read.tensor(name), value) for name, value in values.items())
    content = load_file(packed / "3.safetensors")
    gone = next(name for name in content if name.endswith(".scales"))
    content.pop(gone)
    save_file(content, packed / "3.safetensors", metadata={"format": "pt"})
    shown = refusal(capsys, "evaluate", str(packed))
    assert f"3.safetensors lacks {gone}" in shown


def test_a_layer_of_another_width_is_named_by_pattern(tiny_folder, tmp_path):
    def pack(path, weight):
        if not path.endswith("0.mlp.up_proj"):
            return pack_4bit(path, weight)
        ones = torch.ones(len(weight), 1)
        return gptq_parts(torch.full(weight.shape, 200), 128 * ones.int(), ones / 2, 8, version="gptq")

    dynamic = {"-:.*gate": {}, r"+:.*\.0\..*up_proj$": {"bits": 8, "group_size": -1}, ".*": {}}
    folder = packed_copy(tiny_folder, tmp_path / "packed", {**SETTINGS, "dynamic": dynamic}, pack)
    read = open_checkpoint(folder, compressed=True)
    assert set(read.tensor("model.layers.0.mlp.up_proj.weight").unique().tolist()) == {36.0}
    assert read.quantized("model.layers.0.mlp.up_proj").scheme.bits == 8
    assert read.quantized("model.layers.1.mlp.up_proj").scheme.bits == 4
    assert "with exceptions" in read.summary()


def test_inspect_and_evaluate_read_it(tiny_folder, packed, tmp_path, capsys):
    assert main(["inspect", str(packed)]) == 0
    assert "compressed already: GPTQ, 4 bits, groups of 32; 14 parts" in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text("the list is sorted by its first entry and then by its second one\n" * 60)
    arguments = [
        "evaluate",
        str(packed),
        "--against",
        str(tiny_folder),
        "--text",
        str(text),
        "--windows",
        "1",
    ]
    assert main(arguments) == 0
    assert "KL divergence" in capsys.readouterr().out
    arguments[1], arguments[3] = arguments[3], arguments[1]
    assert main(arguments) == 0


def test_it_is_not_compressed_again(packed, tmp_path, capsys):
    assert main(["run", str(packed), "rtn", "--out", str(tmp_path / "out")]) == 2
    assert "is already compressed" in capsys.readouterr().err
    with pytest.raises(ModelError, match="is already compressed"):
        open_checkpoint(packed)


UP = "model.layers.1.mlp.up_proj"


def renamed(tensors):
    tensors[f"{UP}.qwait"] = tensors.pop(f"{UP}.qweight")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{UP}.scales"), f"{UP}.scales is missing"),
        (lambda t: t.pop(f"{UP}.qzeros"), f"{UP}.qzeros is missing"),
        (lambda t: t.pop(f"{UP}.qweight"), f"{UP}.qweight is missing"),
        (renamed, f"{UP}.qwait is unknown to config.json"),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:, :-1].clone()}), "has shape (2, 95)"),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1].clone()}), "expected (1, 12)"),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][0].clone()}), "expected a matrix"),
        (lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"].long()}), "stored as I64, expected I32"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:-1].clone()}), "has shape (96, 56)"),
        (lambda t: t.update({f"{UP}.g_idx": torch.full((64,), 2).int()}), "outside 0 to 1"),
        (lambda t: t.update({f"{UP}.g_idx": torch.full((64,), -1).int()}), "outside 0 to 1"),
        (lambda t: t.update({f"{UP}.g_idx": torch.zeros(60).int()}), "expected (64,)"),
        (lambda t: t[f"{UP}.scales"].fill_(float("nan")), "holds NaN"),
        (lambda t: t.update({f"{UP}.weight": torch.zeros(96, 64)}), "stored packed and as it is"),
        (lambda t: t.update({"lm_head.qweight": torch.zeros(8, 8).int()}), "lm_head is packed"),
    ],
)
def test_damage_is_one_line(packed, change, said, capsys):
    rewrite(packed, change)
    shown = refusal(capsys, "evaluate", str(packed))
    assert said in shown and "model.safetensors" in shown, shown


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": None}, "bits=None"),
        ({"bits": [4]}, "bits=[4]"),
        ({"group_size": 64}, "scales has 3 groups, group_size 64 of 96 columns makes 2"),
        ({"group_size": -1}, "group_size -1 of 96 columns makes 1"),
        ({"checkpoint_format": "marlin"}, "the GPTQ format 'marlin' is not read"),
        ({"checkpoint_format": ["x"]}, "is not read"),
        ({"dynamic": {"(": {}}}, "'dynamic' cannot be read"),
        ({"dynamic": 3}, "'dynamic' cannot be read"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": "g"}, "group_size is 'g'"),
        ({"bits": 8}, "expected (3, 16)"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(packed, settings, said, capsys):
    edit_settings(packed, **settings)
    shown = refusal(capsys, "inspect", str(packed))
    assert said in shown and str(packed) in shown, shown


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_one_line(packed, share, capsys):
    path = packed / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert str(path) in refusal(capsys, "evaluate", str(packed))


def test_another_format_is_not_taken_for_it(tiny_folder):
    with pytest.raises(ModelError, match="not compressed in the gptq format"):
        GPTQFolder(tiny_folder)


@damaged
def test_damaged_bytes_are_read_or_refused(packed, changes):
    read_damaged(packed, changes)
