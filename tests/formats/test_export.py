"""A finished result in another format: the same values, the same companions, complete or absent."""

import json

import pytest
import torch
from safetensors.torch import load_file

from finished_run import Heard, finished
from frugallm.cli.main import main
from frugallm.conformance import trial
from frugallm.errors import ExportError, FrugalError, OutputError
from frugallm.formats import export as module
from frugallm.formats.decoded import Decoded
from frugallm.formats.export import FORMATS, export
from frugallm.models import load
from frugallm.recipe import Recipe
from frugallm.report_files import manifest_of

RECIPES = {
    "packed": ["gptq:bits=3,skip=[*.down_proj]", "rtn:bits=8,only=[*.1.*down_proj]"],
    "asymmetric": ["rtn:symmetric=false,group_size=16", "embedding:bits=4"],
    "columns beside codes": ["owq:extra_bits=0.5,skip=[*.down_proj]", "rtn:bits=4,only=[*.down_proj]"],
    "entries and two levels": ["spqr:threshold=0.05", "embedding"],
    "rounded inputs": ["smoothquant:token=[*.o_proj]", "embedding"],
    "tables alone": ["embedding:bits=4"],
    "pruned": ["magnitude"],
    "pruned and packed": [
        "magnitude:pattern=2:4",
        "rtn:bits=4,symmetric=false,skip=[*.down_proj]",
        "embedding",
    ],
}


@pytest.mark.parametrize("kind", trial.KINDS)
@pytest.mark.parametrize("steps", RECIPES.values(), ids=RECIPES)
def test_every_weight_is_read_back_as_it_was_stored(kind, steps, tmp_path):
    folder, values, _ = finished(tmp_path, kind, steps)
    decoded = Decoded(folder)
    decoded.validate()
    assert set(decoded.names()) == set(values)
    for name, value in values.items():
        assert torch.equal(decoded.tensor(name).float(), value), name
        assert decoded.shape(name) == tuple(value.shape)
    table = "model.embed_tokens.weight"
    assert torch.equal(decoded.rows(table, 3, 9).float(), values[table][3:9])


@pytest.mark.parametrize("kind", trial.KINDS)
def test_the_dense_folder_computes_what_the_stored_values_say(kind, tmp_path):
    folder, values, model = finished(tmp_path, kind, RECIPES["packed"], stored=torch.float32)
    heard = Heard()
    out = export(folder, "dense", tmp_path / "out", heard)
    assert out == tmp_path / "out" and heard.events == []
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in values.items())
    copy, _ = load_untokenized(out)
    ids = trial.windows(kind)[:2]
    assert torch.allclose(copy(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def load_untokenized(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(
        False
    ), None


def test_the_dense_folder_is_plain_and_keeps_what_belongs_to_the_model(tmp_path):
    folder, values, _ = finished(tmp_path, "tied", RECIPES["rounded inputs"])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    heard = Heard()
    out = export(folder, "dense", progress=heard)
    assert out == folder.resolve().with_name("run-dense")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    stored = load_file(out / "model.safetensors")
    assert set(stored) == set(values)
    assert all(torch.equal(stored[name], value.bfloat16()) for name, value in values.items())
    for name in ("LICENSE", "generation_config.json"):
        assert (out / name).read_bytes() == before[name]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [kind for kind, _ in heard.events] == ["warn"]
    assert "no longer rounded" in heard.events[0][1]["text"]
    card = (out / "README.md").read_text()
    assert 'license: "apache-2.0"' in card and "no longer rounded" in card and "smoothquant" in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-dense"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("results"), "tied", ["rtn"])[0]


@pytest.mark.parametrize(
    ("to", "error", "says"),
    [
        ("dens", ExportError, "no format 'dens'. did you mean 'dense'?"),
        (
            "parquet",
            ExportError,
            "no format 'parquet'. known: awq, bitsandbytes, compressed-tensors, dense, gguf, gptq",
        ),
        (
            "compressed-tensors",
            ExportError,
            "run is in the format compressed-tensors already. Use it as it is",
        ),
        ("dense", OutputError, "taken exists. Choose another --out"),
    ],
)
def test_what_makes_no_sense_is_refused(to, error, says, result, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(error) as caught:
        export(result, to, tmp_path / "taken")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "taken").iterdir()) == [] and len(list(tmp_path.iterdir())) == 1


def test_another_folder_is_replaced_when_asked_for(result, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    export(result, "dense", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "old").exists()


@pytest.mark.parametrize("options", [{"imatrix": True}, {"tables": "Q8_0"}, {"text": "x.txt"}])
def test_what_only_gguf_has_is_refused_elsewhere(options, result, tmp_path):
    with pytest.raises(FrugalError, match=r"--tables|imatrix"):
        export(result, "dense", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_only_a_finished_result_is_exported(result, tmp_path):
    with pytest.raises(ExportError, match="no result of 'frugal run'"):
        export(tmp_path, "dense")
    (tmp_path / "begun.partial").mkdir()
    with pytest.raises(ExportError, match=r"begun is not finished.*--resume"):
        export(tmp_path / "begun", "dense")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ExportError, match=r"manifest\.json cannot be read"):
        export(tmp_path, "dense")


def test_a_result_in_which_nothing_is_quantized_is_dense_already(tmp_path):
    folder, _, _ = finished(tmp_path, "tied", ["magnitude"])
    for name in ("dense", "gptq", "awq", "bitsandbytes"):
        with pytest.raises(ExportError, match="run is dense already: nothing in it is quantized"):
            export(folder, name, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    (folder / "manifest.json").unlink()
    with pytest.raises(FrugalError, match="not compressed"):
        Decoded(folder)


def test_a_damaged_folder_leaves_nothing_behind(tmp_path):
    folder, _, _ = finished(tmp_path, "tied", ["rtn"])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    with pytest.raises(FrugalError, match=r"model\.safetensors"):
        export(folder, "dense")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_broken_export_leaves_nothing_and_a_killed_one_is_not_in_the_way(result, tmp_path, monkeypatch):
    def full(source, folder, progress):
        folder.mkdir()
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    dense = FORMATS["dense"]
    monkeypatch.setitem(FORMATS, "dense", module.Format(dense.summary, full, dense.rounds_inputs))
    with pytest.raises(OSError, match="No space"):
        export(result, "dense", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "out.exporting").mkdir()
    (tmp_path / "out.exporting" / "half").write_text("x")
    export(result, "dense", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "half").exists()


def test_the_command_says_where_and_what_is_lost(tmp_path, capsys):
    folder, _, _ = finished(tmp_path, "tied", ["smoothquant"])
    assert main(["export", str(folder), "--to", "dense", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'out'} written\n"
    assert "warning: the dense format has no place for rounded activations" in shown.err
    assert main(["export", str(folder), "--to", "dnse"]) == 2
    assert "did you mean 'dense'?" in capsys.readouterr().err


def test_a_dense_copy_of_the_trained_model_loads_with_its_tokenizer(trained, tmp_path):
    job = trial.job_for(trained, Recipe.parse(["rtn:bits=8", "embedding"]).steps, None)
    run = trial.carry_out(job, tmp_path / "run")
    (run.folder / "manifest.json").write_text(json.dumps(manifest_of(job, run.folder)))
    run.place.finish()
    model, tokenizer = load(export(tmp_path / "run", "dense"))
    ids = tokenizer("The list is sorted.", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "The list is sorted."
    assert model(ids).logits.isfinite().all()
