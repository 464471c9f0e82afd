"""What a method's page says about where its result loads is what the checks of every method load and what exports write."""

import json

import pytest
from safetensors.torch import load_file, save_file

from finished_run import finished
from frugallm.catalogue import methods
from frugallm.cli.main import main
from frugallm.conformance import checks_for
from frugallm.conformance.outcome import CheckFailed
from frugallm.conformance.stored_models import loads_where_the_table_says
from frugallm.conformance.train_methods import train_job
from frugallm.conformance.trial import KINDS, Trial, windows
from frugallm.errors import ExportError
from frugallm.formats.engines import loads_in_transformers
from frugallm.formats.export import export
from frugallm.handoff import ENGINE, HERE, changes, chosen_later, places
from frugallm.inference.contract import InferenceMethod
from frugallm.pages import method_page
from frugallm.recipe import Recipe
from frugallm.training.contract import TrainMethod
from frugallm.training.result import layout_of


def said(step):
    return {place.name: place.seen for place in places(step)}


def in_transformers(step):
    return any(seen != "no" for name, seen in said(step).items() if name.startswith("transformers"))


def loaded_by_the_checks(method):
    """Whether conformance loads the results of a method's defaults with plain transformers, on each of its models."""
    if issubclass(method, TrainMethod):
        for kind in KINDS:
            job = train_job(method, kind)
            student = job.origin.student(0)
            for step in job.steps:
                step.rewrite(student, job.origin.family)
            yield layout_of(job, student).in_transformers
        return
    with Trial(method) as trial:
        yield from (loads_in_transformers(trial.job(kind).plan) for kind in KINDS)


@pytest.mark.parametrize(
    "name", [name for name, method in methods().items() if not issubclass(method, InferenceMethod)]
)
def test_the_page_says_where_the_checks_load_it(name):
    method = methods()[name]
    here = in_transformers(method())
    assert list(loaded_by_the_checks(method)) == [here] * len(KINDS)
    names = {check.__name__ for check in checks_for(method)}
    assert names & {"every_parameter_value_stores_and_loads", "the_folder_is_what_was_trained"}
    alone = "the_folder_loads_without_us_to_equal_logits"
    if alone in names:
        assert here == (alone not in method.card.expect_fail)
    page = method_page(method).partition("## Where the result loads")[2].partition("\n## ")[0]
    for place in places(method()):
        assert f"{place.name.strip('`')}` | {place.seen}" in page or f"| {place.name} | {place.seen}" in page
    assert f"`{HERE}` | tested" in page


@pytest.mark.parametrize(
    "name", [name for name, method in methods().items() if issubclass(method, InferenceMethod)]
)
def test_the_page_says_for_which_models_the_engine_answers_with_it(name):
    method = methods()[name]
    (place,) = places(method())
    assert place.name == ENGINE and place.seen == "tested"
    assert "llama" in place.note and "gpt2" not in place.note
    page = method_page(method)
    assert f"| `{ENGINE}` | tested | {place.note} |" in page
    assert "## Where it acts" in page and "## Where the result loads" not in page
    assert "| In a recipe | no step" in page
    assert "what_it_is_not_for_is_refused" in {check.__name__ for check in checks_for(method)}


def test_a_folder_that_holds_something_else_is_found_where_only_we_load_it():
    with Trial(methods()["hqq"]) as trial:
        run = trial.run()
        loads_where_the_table_says(run, windows("tied"))
        (file,) = run.folder.glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("weight_zero_point"))
        save_file(tensors | {name: tensors[name] + 1}, file, {"format": "pt"})
        with pytest.raises(CheckFailed, match=r"frugallm\.load it computes something else"):
            loads_where_the_table_says(run, windows("tied"))


@pytest.mark.parametrize("step", ["rtn", "rtn:bits=3", "rtn:bits=5", "hqq", "owq", "llm_int8", "smoothquant"])
def test_exports_that_are_promised_are_written_and_others_refused(tmp_path, step):
    folder, _, _ = finished(tmp_path, "tied", [step])
    (chosen,) = Recipe.parse([step]).steps
    promised = {
        name for name, seen in said(chosen).items() if name.startswith("frugal export") and seen != "no"
    }
    for name in ("dense", "gptq", "awq", "bitsandbytes"):
        if f"frugal export --to {name}" in promised:
            assert export(folder, name, tmp_path / name).is_dir()
        else:
            with pytest.raises(ExportError):
                export(folder, name, tmp_path / name)
    assert len(promised) >= 2
    assert "frugal export --to gguf:TYPE" in promised


def test_choices_that_change_the_answer_are_said():
    found = changes(methods()["gptq"])
    assert found["vLLM on a CPU no, vLLM on CUDA no"] == [f"bits={bits}" for bits in (2, 3, 5, 6, 7)]
    assert any(
        what.startswith("transformers no") and "symmetric=false" in words for what, words in found.items()
    )
    assert not any("act_order" in word for words in found.values() for word in words)
    assert not chosen_later(methods()["gptq"]()) and chosen_later(methods()["mixed_bits"]())


def test_one_method_on_the_command_line(capsys):
    assert main(["methods", "rptq"]) == 0
    shown = capsys.readouterr().out
    assert "| transformers | no | compressed-tensors has no clusters" in shown and "Claim: " in shown
    assert main(["methods", "rptq", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "rptq" and {"name": HERE, "seen": "tested", "note": ""} in found["loads"]
    assert main(["methods", "rtpq"]) == 2
    assert "rptq" in capsys.readouterr().err
    assert main(["methods", "rptq", "--section", "1.1"]) == 2
