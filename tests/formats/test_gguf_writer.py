"""What we write as GGUF is what the gguf package and our own reader find: values, names, order, tokenizer."""

import json

import gguf
import numpy as np
import pytest
import torch
from tiny_llama import MERGES, TEMPLATE, TOKENS, TYPES, GGUFWriter, permute, tiny_model
from tokenizers import normalizers, pre_tokenizers

from frugallm.cli.main import main
from frugallm.conformance import trial
from frugallm.errors import ExportError, FrugalError, ModelError, OutputError, ParameterError
from frugallm.formats.decoded import Decoded
from frugallm.formats.export import export
from frugallm.formats.gguf_types import TYPES as KINDS
from frugallm.formats.gguf_types import encode
from frugallm.formats.gguf_vocabulary import from_tokenizer, pre_tokenizer_name
from frugallm.formats.stored import model_in_memory
from frugallm.models import GGUFFile, InMemory, dense_model, open_checkpoint
from frugallm.models.gguf_tokenizer import PRE, build_tokenizer
from frugallm.recipe import Recipe
from frugallm.report_files import manifest_of
from gguf_models import Heard, other_family, save, written
from packed_folders import gptq_parts, packed_copy
from small_job import write_text

IDS = torch.tensor([[3, 50, 7, 99, 12, 200, 4, 4, 31]])


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    return GGUFWriter(tmp_path_factory.mktemp("gguf"))()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model with rows of 256, some of 96, as a folder."""
    place = tmp_path_factory.mktemp("wide")
    model = tiny_model(hidden_size=256, num_attention_heads=4, head_dim=64)
    values = {"llama.attention.key_length": 64, "llama.attention.value_length": 64}
    return save(place / "model", model, GGUFWriter(place)(model=model, values=values))


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_a_folder_comes_back_with_equal_logits(tmp_path, tied, bias):
    model = tiny_model(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    folder = save(tmp_path / "model", model, GGUFWriter(tmp_path)(model=model))
    heard = Heard()
    path = export(folder, "gguf:F32", progress=heard)
    assert path == tmp_path / "model-F32.gguf"
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), model.state_dict()[name]), name
    assert torch.allclose(dense_model(checkpoint)(IDS).logits, model(IDS).logits, atol=1e-5)
    values, _ = written(path)
    theirs = permute(model.state_dict()["model.layers.1.self_attn.q_proj.weight"].numpy(), 4)
    assert np.array_equal(values["blk.1.attn_q.weight"], theirs)
    assert any("0 rounded" in text for text in heard.said)


@pytest.mark.parametrize(
    ("kind", "changes", "stored_as"),
    [
        ("mistral", {"head_dim": 24, "sliding_window": None}, "llama"),
        ("qwen2", {"tie_word_embeddings": True}, "qwen2"),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}, "qwen3"),
    ],
)
def test_families_come_back_with_equal_logits(kind, changes, stored_as, tmp_path):
    folder, model = other_family(tmp_path, kind, **changes)
    back = open_checkpoint(export(folder, "gguf:F32"))
    assert back.facts["general.architecture"] == stored_as
    assert back.config.tie_word_embeddings is model.config.tie_word_embeddings
    assert torch.allclose(dense_model(back)(IDS).logits, model(IDS).logits, atol=1e-5)
    query = model.state_dict()["model.layers.1.self_attn.q_proj.weight"].numpy()
    expected = permute(query, 4) if stored_as == "llama" else query
    assert np.array_equal(written(back.path)[0]["blk.1.attn_q.weight"], expected)
    text = "The cafe\u0301 12<extra>"
    assert back.tokenizer(text)["input_ids"] == open_checkpoint(folder).tokenizer(text)["input_ids"]
    quantized = open_checkpoint(export(back.path, "gguf:Q8_0"))
    assert (dense_model(quantized)(IDS).logits - model(IDS).logits).abs().max() < 0.5


def test_a_window_that_llama_cpp_does_not_have_is_told(tmp_path):
    folder, _ = other_family(tmp_path, "mistral", sliding_window=16)
    heard = Heard()
    export(folder, "gguf:F32", progress=heard)
    assert heard.said[0].startswith("attention looks back 16 tokens in this model")


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_says_what_our_encoder_chose(kind, wide, tmp_path):
    path = export(wide, f"gguf:{kind}", tmp_path / "out.gguf")
    values, types = written(path)
    source, back = open_checkpoint(wide), open_checkpoint(path)
    linear = "model.layers.1.self_attn.o_proj.weight"
    assert types["blk.1.attn_output.weight"] == kind and types["blk.0.attn_norm.weight"] == "F32"
    rows = encode(source.tensor(linear).float(), kind)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(values["blk.1.attn_output.weight"], expected)
    assert np.array_equal(back.tensor(linear).numpy(), expected)
    key = back.tensor("model.layers.0.self_attn.k_proj.weight").numpy()
    assert np.array_equal(permute(key, 2), values["blk.0.attn_k.weight"])
    assert types["token_embd.weight"] == (kind if kind in ("F32", "F16", "BF16", "Q8_0") else "Q8_0")
    error = (dense_model(back)(IDS).logits - dense_model(source)(IDS).logits).square().mean().sqrt()
    assert error < {"2": 2, "3": 1, "4": 0.7}.get(kind.removeprefix("I").replace("MXFP", "Q")[1], 0.3)
    assert (
        back.facts["general.file_type"]
        == gguf.LlamaFileType[
            {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}.get(
                kind, f"MOSTLY_{kind}" + "_S" * (kind in ("Q3_K", "Q4_K", "Q5_K"))
            )
        ]
    )


def test_rows_that_do_not_fit_are_told_beforehand(wide, tmp_path):
    heard = Heard()
    path = export(wide, "gguf:Q4_K", tmp_path / "out.gguf", heard)
    at = [i for i, text in enumerate(heard.said) if "needs rows of a multiple of 256" in text]
    assert heard.said[at[0]] == (
        "Q4_K needs rows of a multiple of 256: 2 tensors with rows of 96 (down_proj) are stored as Q5_0"
    )
    assert at[0] < heard.said.index("writing the file")
    assert written(path)[1]["blk.0.ffn_down.weight"] == "Q5_0"
    assert "12 Q4_K" in heard.said[-1] and "bits per weight" in heard.said[-1]


def test_tables_have_the_type_asked_for(wide, tmp_path):
    path = export(wide, "gguf:q4_0", tmp_path / "out.gguf", tables="f16")
    types = written(path)[1]
    assert types["token_embd.weight"] == "F16" and types["blk.0.attn_q.weight"] == "Q4_0"


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "BF16"])
def test_tensors_of_a_gguf_file_in_the_same_type_are_copied_byte_for_byte(kind, tmp_path):
    model = tiny_model()
    source = GGUFWriter(tmp_path)(model=model, kind=gguf.GGMLQuantizationType[kind])
    heard = Heard()
    out = export(source, f"gguf:{kind}", tmp_path / "out.gguf", heard, tables=kind)
    ours, theirs = ({t.name: t.data for t in gguf.GGUFReader(p).tensors} for p in (out, source))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert heard.said[-1].startswith("20 tensors lossless, 0 rounded")
    facts = GGUFFile(source).facts
    kept = {k: v for k, v in GGUFFile(out).facts.items() if k in facts}
    assert kept == facts and set(facts) <= set(GGUFFile(out).facts)


def test_other_types_of_a_gguf_file_are_rounded_and_counted(tmp_path):
    source = GGUFWriter(tmp_path)(model=tiny_model(), kind=gguf.GGMLQuantizationType.Q8_0)
    heard = Heard()
    export(source, "gguf:Q4_1", tmp_path / "out.gguf", heard)
    assert heard.said[-1].startswith("6 tensors lossless, 14 rounded")


def result(folder, steps, stored=torch.float32):
    """Return a finished run on the tiny model with its tokenizer, and the model that its stored values make."""
    source = GGUFWriter(folder)()
    checkpoint = open_checkpoint(source)
    tokens = torch.randint(len(TOKENS), (4, 32), generator=torch.Generator().manual_seed(0))
    job = trial.job_for(checkpoint, Recipe.parse(steps).steps, tokens, stored=stored)
    run = trial.carry_out(job, folder / "run")
    model = model_in_memory(run.place.stored(job))
    (run.folder / "manifest.json").write_text(json.dumps(manifest_of(job, run.folder)))
    run.place.finish()
    return folder / "run", model


@pytest.mark.parametrize(
    ("steps", "kind", "rounded"),
    [
        (["gptq:bits=4,group_size=32", "embedding:bits=8"], "Q4_0", 0),
        (["rtn:bits=3,group_size=32", "embedding:bits=8"], "Q4_1", 0),
        (["rtn:bits=8,group_size=-1", "embedding:bits=8"], "Q8_0", 0),
        (["rtn:bits=5,group_size=32", "embedding:bits=4"], "Q5_0", 0),
        (["rtn:bits=4,group_size=16", "embedding:bits=8"], "Q4_0", 14),
        (["rtn:bits=4,group_size=32"], "F32", 0),
    ],
)
def test_codes_of_a_result_are_carried_over(steps, kind, rounded, tmp_path):
    folder, model = result(tmp_path, steps)
    heard = Heard()
    path = export(folder, f"gguf:{kind}", progress=heard)
    assert f"{20 - rounded} tensors lossless, {rounded} rounded" in heard.said[-1]
    back = open_checkpoint(path)
    if not rounded:
        decoded = Decoded(folder)
        for name in decoded.names():
            assert torch.equal(back.tensor(name), decoded.tensor(name).float()), name
        assert torch.allclose(dense_model(back)(IDS).logits, model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize(("kind", "rounded"), [("Q4_0", 0), ("Q4_1", 0), ("IQ4_NL", 14)])
def test_codes_of_a_gptq_folder_are_carried_over(kind, rounded, tiny_folder, tmp_path):
    def pack(_, weight):
        grouped = weight.view(len(weight), -1, 32)
        scales = (grouped.abs().amax(-1) / 7.5).half()
        codes = (grouped / scales[..., None].float()).round().clamp(-8, 7).int() + 8
        zeros = torch.full_like(scales, 8, dtype=torch.int32)
        return gptq_parts(codes.view_as(weight), zeros, scales, 4, version="gptq")

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    folder = packed_copy(tiny_folder, tmp_path / "gptq", settings, pack)
    heard = Heard()
    path = export(folder, f"gguf:{kind}", progress=heard, tables="F32")
    assert f"{20 - rounded} tensors lossless, {rounded} rounded" in heard.said[-1]
    source, back = open_checkpoint(folder, compressed=True), open_checkpoint(path)
    if not rounded:
        assert all(torch.equal(back.tensor(n), source.tensor(n).float()) for n in source.names())


def test_scales_that_float16_lacks_cost_less_than_encoding_anew(tmp_path):
    """Scales of W8A8 are float32: the codes stay, and rounded inputs are said to be lost."""
    folder, _ = result(tmp_path, ["smoothquant"])
    heard = Heard()
    back = open_checkpoint(export(folder, "gguf:Q8_0", progress=heard))
    assert "the gguf format has no place for rounded activations" in heard.said[0]
    decoded, name = Decoded(folder), "model.layers.0.mlp.up_proj.weight"
    value = decoded.tensor(name)
    anew = gguf.quants.dequantize(encode(value, "Q8_0"), gguf.GGMLQuantizationType.Q8_0)
    error = (back.tensor(name) - value).square().sum()
    assert 0 < error < 0.1 * (torch.from_numpy(anew) - value).square().sum()


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_a_folder_says_what_that_of_the_file_said(tmp_path):
    source = GGUFWriter(tmp_path)()
    folder = save(tmp_path / "model", tiny_model(), source)
    facts = GGUFFile(export(folder, "gguf:F32")).facts
    wanted = {k: v for k, v in GGUFFile(source).facts.items() if k.startswith("tokenizer.")}
    assert facts.items() >= wanted.items()
    assert facts["tokenizer.ggml.tokens"] == TOKENS and facts["tokenizer.ggml.merges"] == MERGES
    assert facts["tokenizer.ggml.token_type"] == TYPES and facts["tokenizer.chat_template"] == TEMPLATE
    assert facts["tokenizer.ggml.add_eos_token"] is False


@pytest.mark.parametrize("pre", PRE)
@pytest.mark.parametrize("bos", [True, False])
def test_splits_are_written_under_a_name_that_means_the_same(pre, bos, tmp_path):
    values = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": bos}
    facts = GGUFFile(GGUFWriter(tmp_path)(values=values)).facts
    tokenizer = build_tokenizer(facts, tmp_path)
    found, _ = from_tokenizer(tokenizer, len(TOKENS), "tiny")
    assert PRE[found["tokenizer.ggml.pre"]] == PRE[pre]
    assert found["tokenizer.ggml.add_bos_token"] is bos
    again = build_tokenizer(facts | found, tmp_path)
    for text in ("The 12345 the's  \n\n theΩ", "<|im_start|>12<extra>"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_rows_without_a_token_are_filled_up(tmp_path):
    model = tiny_model(vocab_size=len(TOKENS) + 5)
    source = GGUFWriter(tmp_path)(model=tiny_model())
    facts = GGUFFile(export(save(tmp_path / "model", model, source), "gguf:F32")).facts
    assert len(facts["tokenizer.ggml.tokens"]) == len(TOKENS) + 5 == facts["llama.vocab_size"]
    assert facts["tokenizer.ggml.token_type"][-5:] == [5] * 5
    with pytest.raises(ExportError, match=f"token {len(TOKENS) - 1} .* no row in the embedding of 9"):
        from_tokenizer(GGUFFile(source).tokenizer, 9, "tiny")


def test_named_templates_are_kept(tiny_gguf):
    tokenizer = GGUFFile(tiny_gguf).tokenizer
    tokenizer.chat_template = {"default": "a", "tool": "b"}
    found, _ = from_tokenizer(tokenizer, len(TOKENS), "tiny")
    kept = {k: v for k, v in found.items() if "template" in k}
    assert kept == {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool": "b",
        "tokenizer.chat_templates": ["tool"],
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: setattr(b, "normalizer", normalizers.Lowercase()), "changes the text"),
        (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Whitespace()), "no name in GGUF"),
        (
            lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "no name in GGUF",
        ),
    ],
)
def test_what_gguf_cannot_say_about_a_tokenizer_is_refused(change, said, tiny_gguf):
    backend = GGUFFile(tiny_gguf).tokenizer.backend_tokenizer
    change(backend)
    with pytest.raises(ExportError, match=said):
        pre_tokenizer_name(json.loads(backend.to_str()), "tiny")


# -- importance --------------------------------------------------------------------------------------------------------


def test_an_importance_matrix_lowers_the_error_of_outputs(tmp_path, trained_folder):
    text = write_text(tmp_path / "text.txt", words=4000)
    model = dense_model(open_checkpoint(trained_folder))
    tokenizer = open_checkpoint(trained_folder).tokenizer
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"][:, :512].view(8, 64)
    losses = []
    for options in ({}, {"imatrix": True, "text": text, "samples": 8, "seq_len": 32}):
        path = export(trained_folder, "gguf:Q4_0", tmp_path / "out.gguf", overwrite=True, **options)
        back = dense_model(open_checkpoint(path))
        with torch.no_grad():
            gap = (model(ids).logits.log_softmax(-1) - back(ids).logits.log_softmax(-1)).square().mean()
        losses.append(float(gap))
    assert losses[1] < losses[0]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "out", "options", "error", "says"),
    [
        ("gguf", "x.gguf", {}, ExportError, "gguf needs a type. For example gguf:Q4_0"),
        ("gguf:Q4_2", "x.gguf", {}, ExportError, "no type 'Q4_2'. did you mean 'Q4_"),
        ("gguf:q4-k", "x.gguf", {}, ExportError, "no type 'q4-k'. did you mean 'Q4_K'?"),
        ("dense:Q4_0", "x", {}, ExportError, "dense has no type 'Q4_0'. Write --to dense"),
        ("ggfu:Q4_0", "x.gguf", {}, ExportError, "no format 'ggfu'. did you mean 'gguf'?"),
        ("gguf:Q4_0", "x.bin", {}, OutputError, "does not end in .gguf. Call it x.bin.gguf"),
        (
            "gguf:Q4_0",
            "taken.gguf",
            {},
            OutputError,
            "taken.gguf exists. Choose another --out, or --overwrite it",
        ),
        ("gguf:Q4_0", "folder.gguf", {"overwrite": True}, OutputError, "folder.gguf exists"),
        ("gguf:Q4_0", "x.gguf", {"text": "a.txt"}, ParameterError, "Add --imatrix"),
        ("gguf:Q4_0", "x.gguf", {"tables": "Q9"}, ExportError, "no type 'Q9'"),
        ("gguf:Q4_0", "x.gguf", {"imatrix": True, "samples": 0}, ParameterError, "samples must be 1"),
    ],
)
def test_what_makes_no_sense_is_refused(to, out, options, error, says, tiny_gguf, tmp_path):
    (tmp_path / "taken.gguf").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(error) as caught:
        export(tiny_gguf, to, tmp_path / out, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"taken.gguf", "folder.gguf"}
    assert (tmp_path / "taken.gguf").read_text() == "mine"


def test_the_file_itself_is_not_replaced_but_another_is(tiny_gguf, tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(tiny_gguf.read_bytes())
    with pytest.raises(OutputError, match="is the model itself"):
        export(source, "gguf:F16", source, overwrite=True)
    (tmp_path / "old.gguf").write_text("old")
    (tmp_path / "old.gguf.exporting").write_text("left by a killed export")
    export(source, "gguf:F16", tmp_path / "old.gguf", overwrite=True)
    assert open_checkpoint(tmp_path / "old.gguf").names() == open_checkpoint(source).names()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "old.gguf"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is gelu, llama.cpp computes silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "scaled by 'dynamic', which llama.cpp does not compute",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes, said, tmp_path, tiny_gguf):
    tokenizer = GGUFFile(tiny_gguf).tokenizer
    from frugallm.formats.gguf_writer import make_layout

    with pytest.raises(ExportError, match=said):
        make_layout(InMemory(tiny_model(**changes), tokenizer), "Q4_0")


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias is True, llama.cpp computes False in 'qwen3'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window is True"),
    ],
)
def test_variants_that_llama_cpp_does_not_have_are_refused(kind, changes, said, tmp_path):
    folder, _ = other_family(tmp_path, kind, **changes)
    with pytest.raises(ExportError, match=said):
        export(folder, "gguf:F32")


def test_an_architecture_without_a_row_is_named(tiny_gguf):
    from frugallm.formats.gguf_families import gguf_family

    checkpoint = GGUFFile(tiny_gguf)
    checkpoint.config.model_type = "opt"
    with pytest.raises(
        ExportError, match=r"architecture 'opt' .*llama.cpp has no such architecture\). Written: llama"
    ):
        gguf_family(checkpoint)


def test_values_that_float16_does_not_reach_are_named_and_nothing_stays(tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e6
    folder = save(tmp_path / "model", model, GGUFWriter(tmp_path)())
    for kind in ("F16", "Q4_0"):
        with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1e\+06"):
            export(folder, f"gguf:{kind}", tmp_path / "out" / "x.gguf")
    export(folder, "gguf:BF16", tmp_path / "ok.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "ok.gguf", "tiny.gguf"]


def test_damaged_weights_and_a_full_disk_leave_nothing(tmp_path, monkeypatch):
    def spoil(tensors):
        tensors["blk.1.ffn_up.weight"][0, 0] = np.nan

    source = GGUFWriter(tmp_path)(edit=spoil)
    with pytest.raises(ModelError, match="holds NaN"):
        export(source, "gguf:F32", tmp_path / "out.gguf")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    source = GGUFWriter(tmp_path)()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space"):
        export(source, "gguf:Q4_0", tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


def test_an_unfinished_run_is_named(tmp_path):
    (tmp_path / "begun.partial").mkdir()
    with pytest.raises(FrugalError, match=r"begun is not finished.*--resume"):
        export(tmp_path / "begun", "gguf:Q4_0")


def test_the_command_says_what_became_of_the_tensors(tiny_gguf, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    assert main(["export", str(tiny_gguf), "--to", "gguf:Q4_K", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out} written\n"
    assert "are stored as Q5_0" in shown.err and "tensors lossless" in shown.err
    assert main(["export", str(tiny_gguf), "--to", "gguf:Q4_K", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(tiny_gguf), "--to", "gguf:Q4_K", "--out", str(out), "--overwrite"]) == 0
