"""AWQ folders: what the published rules of the layout say, without the toolkit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugallm.cli.main import main
from frugallm.formats.awq_layout import unpack_gemm, unpack_gemv
from frugallm.models import load, open_checkpoint
from packed_folders import (
    awq_parts,
    damaged,
    edit_settings,
    gemv_parts,
    packed_copy,
    read_damaged,
    refusal,
    rewrite,
)

SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
UP = "model.layers.1.mlp.up_proj"


@st.composite
def linears(draw):
    rows, groups = 8 * draw(st.integers(1, 5)), draw(st.integers(1, 10))
    size = 8 * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    codes = torch.randint(0, 16, (rows, size * groups), generator=generator)
    symmetric = draw(st.booleans())
    zeros = torch.randint(8 if symmetric else 0, 9 if symmetric else 16, (rows, groups), generator=generator)
    return codes, zeros, torch.rand(rows, groups, generator=generator).half() + 0.1, size


@settings(max_examples=60, deadline=None)
@given(linears(), st.sampled_from(["gemm", "gemv"]), st.integers(0, 2))
def test_every_width_and_version_is_decoded(linear, version, spare):
    codes, zeros, scales, size = linear
    if version == "gemm":
        found = unpack_gemm(**awq_parts(codes, zeros, scales))
    else:
        parts = gemv_parts(codes, zeros, scales, -(-zeros.shape[1] // 8) + spare)
        found = unpack_gemv(**parts, groups=zeros.shape[1])
    assert (found.zero is None) == bool((zeros == 8).all())
    values = found.dequantize()
    for row in range(len(codes)):
        for column in range(0, codes.shape[1], 5):
            at = row, column // size
            assert float(values[row, column]) == float(scales[at]) * (
                int(codes[row, column]) - int(zeros[at])
            )


def round_asymmetric(weight):
    """Return codes, zero points and scales in groups of 32."""
    grouped = weight.view(len(weight), -1, 32)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (grouped / scales[..., None].float() + zeros[..., None]).round().clamp(0, 15)
    return codes.view(weight.shape).int(), zeros.int(), scales


def pack(path, weight):
    return awq_parts(*round_asymmetric(weight))


@pytest.fixture
def packed(tiny_folder, tmp_path):
    return packed_copy(tiny_folder, tmp_path / "packed", SETTINGS, pack)


@pytest.mark.parametrize("version", ["gemm", "GEMV"])
def test_a_folder_is_the_model_that_its_codes_stand_for(tiny_folder, tmp_path, version):
    def either(path, weight):
        parts = round_asymmetric(weight)
        return awq_parts(*parts) if version == "gemm" else gemv_parts(*parts, words=2)

    folder = packed_copy(tiny_folder, tmp_path / "packed", {**SETTINGS, "version": version}, either)
    original, read = open_checkpoint(tiny_folder), open_checkpoint(folder, compressed=True)
    assert read.names() == original.names()
    model, _ = load(folder)
    for name in read.names():
        weight = original.tensor(name)
        if name.endswith("_proj.weight"):
            codes, zeros, scales = round_asymmetric(weight)
            spread = [t.repeat_interleave(32, 1).float() for t in (zeros, scales)]
            weight = (codes - spread[0]) * spread[1]
        assert torch.equal(read.tensor(name), weight), name
        assert torch.equal(read.rows(name, 3, 9), weight[3:9]), name
        assert torch.equal(model.state_dict()[name], weight), name


def test_inspect_says_what_it_is(packed, capsys):
    assert main(["inspect", str(packed)]) == 0
    assert "compressed already: AWQ (gemm), 4 bits, groups of 32; 14 parts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{UP}.scales"), f"{UP}.scales is missing"),
        (lambda t: t.pop(f"{UP}.qzeros"), f"{UP}.qzeros is missing"),
        (lambda t: t.pop(f"{UP}.qweight"), f"{UP}.qweight is missing"),
        (
            lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].T.clone()}),
            "shape (96, 2), expected (2, 96)",
        ),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].int()}), "stored as I32"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].T.clone()}), "expected (1, 512)"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:60].clone()}), "has shape (96, 60)"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:33].clone()}), "2 groups cannot share"),
        (lambda t: t.update({f"{UP}.g_idx": torch.zeros(64).int()}), "g_idx is unknown to config.json"),
        (lambda t: t[f"{UP}.scales"].fill_(float("inf")), "holds NaN"),
    ],
)
def test_damage_is_one_line(packed, change, said, capsys):
    rewrite(packed, change)
    shown = refusal(capsys, "evaluate", str(packed))
    assert said in shown and "model.safetensors" in shown, shown


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bits": 3}, "bits=3"),
        ({"version": "gemv_fast"}, "the AWQ version 'gemv_fast' is not read"),
        ({"version": 4}, "the AWQ version '4' is not read"),
        ({"version": "gemv"}, "has shape"),
        ({"group_size": 64}, "expected"),
        ({"group_size": None}, "group_size is None"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(packed, changed, said, capsys):
    edit_settings(packed, **changed)
    shown = refusal(capsys, "inspect", str(packed))
    assert said in shown and str(packed) in shown, shown


@damaged
def test_damaged_bytes_are_read_or_refused(packed, changes):
    read_damaged(packed, changes)
