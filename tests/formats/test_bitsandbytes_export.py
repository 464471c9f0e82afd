"""What ``llm_int8`` made, in the 8-bit format of bitsandbytes: unpacked by that format's own rules."""

import json

import pytest
import torch
from safetensors.torch import load_file

from frugallm.conformance import trial
from frugallm.errors import ExportError
from frugallm.formats.decoded import Decoded
from frugallm.formats.export import export
from frugallm.formats.stored import model_in_memory
from frugallm.formats.verify import ROUNDED_INPUT_TOLERANCE
from frugallm.models import load
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe
from frugallm.report_files import manifest_of


def finished(folder, steps, kind="untied"):
    """Return a finished result with the values in it."""
    job = trial.job_for(InMemory(trial.random_model(kind)), Recipe.parse(steps).steps, trial.windows(kind))
    run = trial.carry_out(job, folder / "run")
    model = model_in_memory(run.place.stored(job))
    (run.folder / "manifest.json").write_text(json.dumps(manifest_of(job, run.folder)))
    run.place.finish()
    return folder / "run", model


@pytest.mark.parametrize("kind", trial.KINDS)
def test_our_own_folder_is_read_back_with_its_outlier_channels(kind, tmp_path, monkeypatch):
    folder, model = finished(tmp_path, ["llm_int8:threshold=3"], kind)
    monkeypatch.setattr("frugallm.models.open.load_tokenizer", lambda _: None)
    back, _ = load(folder)
    ids = trial.windows(kind)[:2]
    with torch.no_grad():
        logits = back(ids).logits
        assert torch.equal(logits, model(ids).logits)
        path = "model.layers.0.mlp.up_proj"
        back.get_submodule(path)._forward_pre_hooks.clear()
        assert not torch.equal(logits, back(ids).logits)  # the inputs really are rounded


@pytest.mark.parametrize("kind", trial.KINDS)
def test_the_format_unpacks_to_the_stored_values(kind, tmp_path):
    folder, model = finished(tmp_path, ["llm_int8:skip=[*.layers.1.*]", "embedding"], kind)
    values = model.state_dict()
    out = export(folder, "bitsandbytes")
    stored = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config["load_in_8bit"]
    assert config["llm_int8_threshold"] == 6.0
    left = [path for path in Decoded(folder).linears() if path.startswith("model.layers.1.")]
    assert config["llm_int8_skip_modules"] == ["lm_head", *left]
    codes = {name.removesuffix(".SCB") for name in stored if name.endswith(".SCB")}
    assert codes == set(Decoded(folder).linears()) - set(left) and len(left) == len(codes) == 7
    for name, value in values.items():
        path = name.removesuffix(".weight")
        if name != path and path in codes:
            weight, top = stored[name], stored[f"{path}.SCB"]
            assert weight.dtype is torch.int8 and top.dtype is torch.float32 and top.shape == weight.shape[:1]
            assert (
                stored[f"{path}.weight_format"].dtype is torch.uint8 and stored[f"{path}.weight_format"] == 0
            )
            torch.testing.assert_close(weight * top[:, None] / 127, value, rtol=1e-6, atol=0)
        elif name in stored:
            assert torch.equal(stored[name], value.bfloat16())
        else:
            assert kind == "tied" and name == "lm_head.weight"


@pytest.mark.parametrize("threshold", [1.5, 6.0])
def test_our_reader_of_the_format_computes_the_same(threshold, tmp_path, monkeypatch):
    folder, model = finished(tmp_path, [f"llm_int8:threshold={threshold}"])
    monkeypatch.setattr("frugallm.models.open.load_tokenizer", lambda _: None)
    back, _ = load(export(folder, "bitsandbytes"))
    ids = trial.windows("untied")[:2]
    with torch.no_grad():
        logits, wanted = back(ids).logits, model(ids).logits
    assert (logits - wanted).square().sum() <= ROUNDED_INPUT_TOLERANCE * wanted.square().sum()


def test_transformers_understands_the_configuration(tmp_path):
    from transformers import BitsAndBytesConfig

    folder, _ = finished(tmp_path, ["llm_int8:threshold=4.5"])
    content = json.loads((export(folder, "bitsandbytes") / "config.json").read_text())
    read = BitsAndBytesConfig.from_dict(content["quantization_config"])
    assert read.quantization_method() == "llm_int8" and read.llm_int8_threshold == 4.5
    assert read.llm_int8_skip_modules == ["lm_head"] and not read.llm_int8_has_fp16_weight


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (
            ["rtn"],
            r"cannot hold model.layers.0.self_attn.q_proj \(W4 g16 symmetric\)\. It holds results of llm_int8",
        ),
        (["llm_int8:threshold=0"], r"cannot hold .* A8 per token\)"),
        (["embedding"], "has no linear in 8 bits"),
        (
            ["llm_int8:only=[*.mlp.*]", "llm_int8:threshold=3,skip=[*.mlp.*]"],
            "one threshold, model.layers.0.self_attn.q_proj has 3 and model.layers.0.mlp.gate_proj 6",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_nothing_left(steps, says, tmp_path):
    folder, _ = finished(tmp_path, steps)
    with pytest.raises(ExportError, match=says) as caught:
        export(folder, "bitsandbytes")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
