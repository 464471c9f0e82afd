"""Results as GPTQ and AWQ folders: the same codes by the published rules, and what the layouts cannot hold."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from finished_run import Heard, finished
from frugallm.cli.main import main
from frugallm.compression import run
from frugallm.conformance.families import variant
from frugallm.formats import awq_layout, gptq_layout
from frugallm.formats.decoded import Decoded
from frugallm.formats.export import export
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.models import load, open_checkpoint
from packed_folders import refusal


def field(word, place, bits):
    """Return the bits of a word, given as signed, from ``place`` on."""
    return (word % 2**32) >> place & (2**bits - 1)


def gptq_value(parts, bits, row, column, one):
    """Read one weight from the tensors of a linear, field by field; ``one`` is what zero points are short of."""

    def code(words, index):  # a stream of words: a code may go on in the next one
        stream = sum((word % 2**32) << (32 * i) for i, word in enumerate(words))
        return stream >> (bits * index) & (2**bits - 1)

    group = int(parts["g_idx"][column])
    zero = code(parts["qzeros"][group].tolist(), row) + one
    return float(parts["scales"][group, row]) * (code(parts["qweight"][:, row].tolist(), column) - zero)


def awq_value(parts, row, column):
    """Read one weight from the tensors of a linear."""
    word, place = row // 8, (0, 2, 4, 6, 1, 3, 5, 7).index(row % 8) * 4
    group = column // (parts["qweight"].shape[0] // parts["scales"].shape[0])
    code, zero = (
        field(int(parts[n][at, word]), place, 4) for n, at in (("qweight", column), ("qzeros", group))
    )
    return float(parts["scales"][group, row]) * (code - zero)


@st.composite
def grids(draw, widths):
    bits, symmetric = draw(st.sampled_from(widths)), draw(st.booleans())
    size, groups = 32 * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    scheme = WeightScheme(
        bits=bits, symmetric=symmetric, group_size=size if groups > 1 else None, scale_dtype="float16"
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    low, high = scheme.code_range
    rows = 32 * draw(st.integers(1, 2))
    codes, zero = (
        torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)
        for shape in ((rows, size * groups), (rows, groups))
    )
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).half()
    return QuantizedTensor(codes, scale, None if symmetric else zero, scheme)


@settings(max_examples=40, deadline=None)
@given(grids([2, 3, 4, 8]))
def test_gptq_packs_what_it_unpacks(q):
    parts = gptq_layout.pack(q)
    found = gptq_layout.unpack(**parts, bits=q.scheme.bits, less_one=q.scheme.symmetric)
    assert (
        found.scheme == q.scheme and torch.equal(found.codes, q.codes) and torch.equal(found.scale, q.scale)
    )
    values, one = q.dequantize(), int(q.scheme.symmetric)
    for row in range(0, len(values), 9):
        for column in range(0, values.shape[1], 7):
            assert gptq_value(parts, q.scheme.bits, row, column, one) == float(values[row, column])


@settings(max_examples=40, deadline=None)
@given(grids([4]))
def test_awq_packs_what_it_unpacks(q):
    parts = awq_layout.pack(q)
    found = awq_layout.unpack_gemm(**parts)
    assert (
        found.scheme == q.scheme and torch.equal(found.codes, q.codes) and torch.equal(found.scale, q.scale)
    )
    values = q.dequantize()
    for row in range(0, len(values), 9):
        for column in range(0, values.shape[1], 7):
            assert awq_value(parts, row, column) == float(values[row, column])


RECIPES = {
    "gptq 4": ("gptq", ["gptq:bits=4,group_size=32"]),
    "gptq 2 asymmetric": ("gptq", ["rtn:bits=2,group_size=16,symmetric=false"]),
    "gptq 3": ("gptq", ["rtn:bits=3,group_size=32"]),
    "gptq 8 per row": ("gptq", ["rtn:bits=8,group_size=-1", "embedding"]),
    "gptq in part": ("gptq", ["rtn:bits=4,skip=[*.down_proj,*.o_proj]"]),
    "awq": ("awq", ["gptq:bits=4"]),
    "awq asymmetric": ("awq", ["rtn:bits=4,group_size=32,symmetric=false", "embedding:bits=4"]),
    "awq in part": ("awq", ["rtn:bits=4,skip=[*.0.*down_proj]"]),
}


@pytest.mark.parametrize(("to", "steps"), RECIPES.values(), ids=RECIPES)
def test_a_result_keeps_its_values(to, steps, tmp_path):
    folder, values, model = finished(tmp_path, "tied", steps, stored=torch.float32)
    heard = Heard()
    out = export(folder, to, tmp_path / "out", heard)
    source, read = Decoded(folder), open_checkpoint(out, compressed=True)
    assert read.method == to and set(read.names()) == set(values)
    assert set(read.packed) == {path for path in source.packed if "layers" in path}
    for name, value in values.items():
        assert torch.equal(read.tensor(name).float(), value), name
    tokens = torch.arange(3, 40)[None]
    ours, _ = load_untokenized(out)
    assert torch.equal(ours(tokens).logits, model(tokens).logits)
    tables = [text for kind, facts in heard.events if kind == "warn" and (text := facts["text"])]
    assert [("no compressed tables" in text) for text in tables] == [True] * ("embedding" in str(steps))


def load_untokenized(folder):
    from frugallm.formats.packed_folder import load_packed, reader_of

    return load_packed(reader_of(folder)(folder), torch.float32), None


@pytest.mark.parametrize(("to", "steps"), RECIPES.values(), ids=RECIPES)
def test_the_config_is_one_that_transformers_reads(to, steps, tmp_path, monkeypatch):
    from transformers.utils import quantization_config as theirs

    folder, _, _ = finished(tmp_path, "tied", steps)
    written = json.loads((export(folder, to) / "config.json").read_text())["quantization_config"]
    assert written.pop("quant_method") == to
    monkeypatch.setattr(
        theirs.importlib.metadata, "version", lambda package: "9.0"
    )  # optimum is not installed
    config = {"gptq": theirs.GPTQConfig, "awq": theirs.AwqConfig}[to](**written)
    scheme = next(
        s for path in Decoded(folder).packed if (s := Decoded(folder).scheme(path)) and "layers" in path
    )
    assert (config.bits, config.group_size) == (scheme.weights.bits, scheme.weights.group_size or -1)
    if to == "gptq":
        assert config.format == ("gptq" if scheme.weights.symmetric else "gptq_v2")
        in_block = config.modules_in_block_to_quantize
        assert (in_block is None) == ("skip" not in str(steps))
        assert in_block is None or ("mlp.down_proj" not in in_block[0] and "mlp.up_proj" in in_block[0])
    else:
        assert config.format == "gemm" and config.zero_point
        kept = ["model.layers.0.mlp.down_proj"] if "skip" in str(steps) else []
        assert config.modules_to_not_convert == [*kept, "lm_head"]


def test_a_folder_with_biases_and_an_untied_head(tmp_path):
    folder, values, _ = finished(tmp_path, "untied", ["rtn:bits=4,group_size=16"])
    for to in ("gptq", "awq"):
        read = open_checkpoint(export(folder, to), compressed=True)
        assert all(torch.equal(read.tensor(name).float(), value) for name, value in values.items())
        stored = load_file(read.path / "model.safetensors")
        assert "lm_head.weight" in stored and "model.layers.0.mlp.up_proj.bias" in stored
        assert stored["model.layers.0.mlp.up_proj.scales"].dtype is torch.float16


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral", "gemma3"])
@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_other_families_keep_their_values(name, to, tmp_path):
    """Conv1D is packed as (out, in) like any linear, experts one by one under the names of published files."""
    folder, values, model = finished(tmp_path, variant(name), ["rtn:bits=4,group_size=32"], torch.float32)
    out = export(folder, to)
    read = open_checkpoint(out, compressed=True)
    assert set(read.names()) == set(values) and len(read.packed) == len(read.linears())
    assert all(torch.equal(read.tensor(name).float(), value) for name, value in values.items())
    tokens = torch.arange(3, 40)[None]
    assert torch.allclose(load_untokenized(out)[0](tokens).logits, model(tokens).logits, atol=1e-5)
    stored = load_file(out / "model.safetensors")
    if name == "mixtral":
        assert f"model.layers.0.block_sparse_moe.experts.1.w2.{'scales'}" in stored


def rescale(folder, factor):
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name] = tensors[name] * factor
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors[name]


def test_scales_that_float16_does_not_hold_are_counted(tmp_path):
    folder, _, _ = finished(tmp_path, "tied", ["rtn:bits=4,group_size=32"])
    scale = rescale(folder, 2.0**-12)
    heard = Heard()
    out = export(folder, "gptq", progress=heard)
    error = (scale.half().double() / scale.double() - 1).abs()
    assert 0 < error.max() < 0.1
    (note,) = [facts["text"] for kind, facts in heard.events if kind == "warn"]
    total = sum(Decoded(folder).quantized(path).scale.numel() for path in Decoded(folder).packed)
    wanted = f"{int((error > 0).sum())} of {total} change, by {float(error.max()):.2g} of their value at most"
    assert wanted in note and note in (out / "README.md").read_text()
    stored = load_file(out / "model.safetensors")["model.layers.1.mlp.up_proj.scales"]
    assert torch.equal(stored, scale.half().T)


def test_scales_beyond_float16_are_refused(tmp_path, capsys):
    folder, _, _ = finished(tmp_path, "tied", ["rtn:bits=4"])
    rescale(folder, 1e8)
    shown = refusal(capsys, "export", str(folder), "--to", "awq")
    assert "model.layers.1.mlp.up_proj reach" in shown and "65504" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("to", "kind", "steps", "said"),
    [
        ("gptq", "tied", ["smoothquant"], "GPTQ has no place for rounded inputs"),
        ("awq", "tied", ["smoothquant", "embedding"], "AWQ has no place for rounded inputs"),
        ("awq", "tied", ["rtn:bits=3"], "AWQ has only 4 bits"),
        ("gptq", "tied", ["hqq:bits=4"], "GPTQ has whole zero points only"),
        ("gptq", "tied", ["rtn:grid=fp4"], "GPTQ has integers only"),
        ("gptq", "tied", ["owq:bits=4,symmetric=true"], "GPTQ has codes and nothing beside them"),
        ("awq", "tied", ["spqr:bits=4"], "AWQ has whole zero points only"),
        ("gptq", "tied", ["rtn:bits=5"], "GPTQ has only 2, 3, 4, 8 bits"),
        ("gptq", "tied", ["embedding"], "no quantized linear"),
        (
            "gptq",
            "untied",
            ["rtn:bits=3,group_size=16"],
            "whole words of 32 bits only, and it has 112 rows and 64",
        ),
        (
            "gptq",
            "tied",
            ["gptq:bits=4,skip=[*.down_proj]", "rtn:bits=8,only=[*.down_proj]"],
            "one scheme for all",
        ),
        ("gptq", "tied", ["rtn:bits=4,skip=[*.0.*down_proj]"], "block 1 differs from block 0"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_beforehand(to, kind, steps, said, tmp_path, capsys):
    folder, _, _ = finished(tmp_path, kind, steps)
    shown = refusal(capsys, "export", str(folder), "--to", to)
    assert said in shown and str(folder) in shown and "--to dense" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_command_writes_it(tmp_path, capsys):
    folder, _, _ = finished(tmp_path, "tied", ["rtn:bits=4", "embedding"])
    assert main(["export", str(folder), "--to", "gptq"]) == 0
    shown = capsys.readouterr()
    assert f"{tmp_path / 'run-gptq'} written" in shown.out
    assert "GPTQ has no compressed tables: model.embed_tokens written out in bfloat16" in shown.err
    assert main(["inspect", str(tmp_path / "run-gptq")]) == 0
    assert "compressed already: GPTQ, 4 bits, groups of 32; 14 parts" in capsys.readouterr().out
    card = (tmp_path / "run-gptq" / "README.md").read_text()
    assert "no compressed tables" in card
    assert "- vLLM 0.32 on CPU: 4 bits, symmetric (tested; computes in 16-bit types only; groups of" in card


def test_an_exported_model_is_loaded_with_its_tokenizer(tiny_folder, tmp_path):
    out, steps = tmp_path / "run", ["rtn:bits=4,group_size=32"]
    run(str(tiny_folder), steps, out=out, evaluate=False, verify=False)
    model, tokenizer = load(export(out, "awq"))
    assert model(tokenizer("the", return_tensors="pt")["input_ids"]).logits.isfinite().all()
