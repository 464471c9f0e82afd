"""Methods that act while a model answers: what the contract refuses, and that their checks find what they look for."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import GPT2Config

from frugallm.cli.main import main
from frugallm.conformance import inference_methods
from frugallm.conformance.outcome import CheckFailed
from frugallm.conformance.trial import Trial, random_model
from frugallm.errors import ModelError, ParameterError
from frugallm.inference.contract import InferenceMethod
from frugallm.kernels import library
from frugallm.method import Card
from frugallm.models.in_memory import InMemory

native = pytest.mark.skipif(not library.usable_paths(), reason="the native kernels are not built")


class Plain(InferenceMethod):
    """What the native step does anyway."""

    card: ClassVar[Card] = Card(title="Plain", summary="x", baseline="none", claim="none")
    tolerance: ClassVar[float] = 1e-4


class Wrapped:
    """A runner with one thing wrong."""

    def __init__(self, runner):
        self.runner, self.block_size = runner, runner.block_size

    def step(self, tokens, positions, starts, tables, wanted):
        return self.runner.step(tokens, positions, starts, tables, wanted)

    def copy_block(self, source, target):
        self.runner.copy_block(source, target)


class Neighborly(Wrapped):
    """A token's logits depend on how many tokens a step holds."""

    def step(self, tokens, *rest):
        return super().step(tokens, *rest) + 1e-4 * len(tokens)


class Foresighted(Wrapped):
    """A token sees the last one of the step."""

    def step(self, tokens, *rest):
        return super().step(tokens, *rest) + 1e-4 * float(tokens[-1])


class Careless(Wrapped):
    """What is copied is left where it is."""

    def copy_block(self, source, target):
        pass


def method(wrong):
    class Broken(Plain):
        card: ClassVar[Card] = Plain.card

        def runner(self, *given, **more):
            return wrong(super().runner(*given, **more))

    return Broken


@native
@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (Neighborly, "cutting_a_text_changes_no_bit"),
        (Neighborly, "texts_beside_it_change_no_bit"),
        (Neighborly, "a_long_text_is_no_exception"),
        (Foresighted, "later_tokens_change_no_bit"),
        (Careless, "a_copied_block_holds_the_same"),
    ],
)
def test_checks_find_what_they_look_for(wrong, check):
    look = getattr(inference_methods, check)
    with Trial(Plain) as right, Trial(method(wrong)) as broken:
        look(right)
        with pytest.raises(CheckFailed):
            look(broken)


@native
def test_what_is_further_from_the_plain_model_than_it_says_is_found():
    class Exact(Plain):
        card: ClassVar[Card] = Plain.card
        tolerance: ClassVar[float] = 1e-12

    with Trial(Exact) as trial, pytest.raises(CheckFailed, match="squared error"):
        inference_methods.the_plain_model_is_computed(trial)


@native
def test_what_says_nothing_about_models_that_it_refuses_is_found():
    class Silent(Plain):
        card: ClassVar[Card] = Plain.card

        def why_not(self, config):
            return ""

    with Trial(Silent) as trial, pytest.raises(CheckFailed, match="gpt2 is refused"):
        inference_methods.what_it_is_not_for_is_refused(trial)


@pytest.mark.parametrize("line", [["run", "smollm2-135m"], ["train", "smollm2-135m", "--max-steps", "1"]])
@pytest.mark.parametrize("name", ["tiled_attention", "integer_products"])
def test_it_is_no_step_of_a_recipe(tmp_path, capsys, line, name):
    assert main([*line, name, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"'{name}' acts while a model answers" in said and "frugal generate" in said
    assert list(tmp_path.iterdir()) == []


def test_a_claim_without_native_kernels_or_model_is_refused(monkeypatch):
    bench = SimpleNamespace(checkpoint=InMemory(random_model("tied")), model_name="m")
    monkeypatch.setenv("FRUGAL_KERNELS", "reference")
    assert "native kernels" in Plain.claim_needs()
    with pytest.raises(ParameterError, match="needs native kernels"):
        Plain.check_claim(bench)
    monkeypatch.delenv("FRUGAL_KERNELS")
    if library.usable_paths():
        Plain.check_claim(bench)
        bench.checkpoint = SimpleNamespace(config=GPT2Config())
        with pytest.raises(ModelError, match="gpt2"):
            Plain.check_claim(bench)


def test_inspect_says_where_it_acts(capsys, tmp_path):
    from transformers import AutoModelForCausalLM

    random_model("tied").save_pretrained(tmp_path / "llama")
    config = GPT2Config(
        vocab_size=67, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    seen = {}
    for name in ("llama", "gpt2"):
        main(["inspect", str(tmp_path / name)])
        lines = capsys.readouterr().out.splitlines()
        seen[name] = [line for line in lines if line.startswith("  tiled_attention")]
    assert "(frugal generate)" in seen["llama"][0]
    assert "does not act" in seen["gpt2"][0] and "'gpt2'" in seen["gpt2"][0]
