"""The table of engines says what transformers loads, and what it does not load really fails there."""

import pytest
import torch

from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.formats.engines import engines_for, loads_in_transformers, table
from frugallm.formats.stored import model_in_memory
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe


def run(tmp_path, *steps, kind="tied"):
    return carry_out(
        job_for(InMemory(random_model(kind)), Recipe.parse(steps).steps, windows(kind)), tmp_path / "run"
    )


@pytest.mark.parametrize(
    "steps", [["rtn:symmetric=false"], ["embedding:bits=4"], ["rtn", "embedding:bits=4"]]
)
def test_what_the_table_refuses_does_not_load(tmp_path, steps):
    from transformers import AutoModelForCausalLM

    done = run(tmp_path, *steps)
    assert not loads_in_transformers(done.job.plan)
    refusal = [row for row in engines_for(done.job.plan) if row.engine == "transformers"]
    assert refusal and all(row.seen == "no" and row.note for row in refusal)
    with pytest.raises((RuntimeError, AttributeError)):
        AutoModelForCausalLM.from_pretrained(str(done.folder), dtype=torch.float32)(windows("tied"))


def test_packed_zero_points_load_when_weights_are_dequantized_on_loading(tmp_path):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    done = run(tmp_path, "rtn:symmetric=false")
    how = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(done.folder), dtype=torch.float32, quantization_config=how
    )
    with torch.no_grad():
        logits, wanted = (
            m(windows("tied")).logits for m in (model, model_in_memory(done.place.stored(done.job)))
        )
    assert (logits - wanted).square().sum() <= 1e-3 * wanted.square().sum()


def test_rows_that_refuse_say_why():
    assert all(row.note for row in table() if row.seen == "no")
    assert {row.seen for row in table()} == {"tested", "documented", "no"}


def test_inputs_of_fewer_bits_are_for_transformers_alone():
    def engines(step):
        job = job_for(InMemory(random_model("tied")), Recipe.parse([step]).steps, windows("tied"))
        return {row.engine for row in engines_for(job.plan) if row.seen != "no"}

    assert engines("os_plus") == {"transformers", "vLLM"}
    assert engines("os_plus:input_bits=6") == {"transformers"}
    assert engines("rptq") == set()
