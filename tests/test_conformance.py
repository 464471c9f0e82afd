"""Every method that is found passes every check of its family; and the checks find what they look for."""

import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from pydantic import Field

from frugallm.catalogue import find_method, methods
from frugallm.compress.contract import BlockMethod, PruneMethod
from frugallm.compress.prune.unstructured.masks import Sparsity, choose_zeros
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.conformance import check, checks_for
from frugallm.conformance.examples import other_values, variants, wrong_values
from frugallm.conformance.outcome import run_check
from frugallm.conformance.trial import Trial
from frugallm.formats.quantized_tensor import WeightScheme
from frugallm.inference.contract import InferenceMethod
from frugallm.kernels.library import usable_paths
from frugallm.method import Card
from frugallm.skeleton import families, write_skeleton


@pytest.mark.parametrize("name", methods())
def test_method(name):
    if issubclass(methods()[name], InferenceMethod) and not usable_paths():
        pytest.skip("the native kernels are not built")
    outcomes = check(methods()[name])
    failed = [f"{outcome.name}: {outcome.reason}" for outcome in outcomes if not outcome.passed]
    assert not failed, "\n".join(failed)
    assert len(outcomes) >= 20


@pytest.mark.parametrize("family", families())
def test_what_frugal_new_writes_passes(family, tmp_path):
    method = find_method(str(write_skeleton(family, "brand_new", tmp_path)))
    failed = [f"{outcome.name}: {outcome.reason}" for outcome in check(method) if not outcome.passed]
    assert not failed, "\n".join(failed)


class Careless(BlockMethod):
    """Rounds as it should; every test below breaks one thing."""

    card: ClassVar[Card] = Card(title="Careless", summary="x", baseline="rtn", claim="none")
    solves: ClassVar[Literal["step", "default", "no"]] = "step"
    bits: Literal[2, 4, 8] = Field(4, description="bits per weight")

    def weights(self, widths):
        return WeightScheme(bits=self.bits)

    def solve(self, weight, scheme, statistics):
        return round_to_nearest(weight, scheme)


class Random(Careless):
    card: ClassVar[Card] = Careless.card

    def solve(self, weight, scheme, statistics):
        return round_to_nearest(weight + 0.1 * torch.randn_like(weight), scheme)


class RowsSeeEachOther(Careless):
    card: ClassVar[Card] = Careless.card

    def solve(self, weight, scheme, statistics):
        return round_to_nearest(weight - weight.mean(0), scheme)


class InPlace(Careless):
    card: ClassVar[Card] = Careless.card

    def solve(self, weight, scheme, statistics):
        return round_to_nearest(weight.mul_(1.01), scheme)


class SaysFourStoresThree(Careless):
    card: ClassVar[Card] = Careless.card

    def solve(self, weight, scheme, statistics):
        return round_to_nearest(weight, WeightScheme(bits=scheme.bits, group_size=16))


class Halves(Careless):
    card: ClassVar[Card] = Careless.card

    def rewrite(self, block, statistics):
        for path in block.linears:
            block.set_weight(path, block.weight(path) / 2)


class IgnoresTheMoment(Careless):
    card: ClassVar[Card] = Careless.card
    solve_needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    def solve(self, weight, scheme, statistics):
        q = round_to_nearest(weight, scheme)
        q.codes[:, ::2] = q.codes[:, ::2].clamp(*scheme.code_range) ^ 1
        return q


class NeedsMoreThanItSays(Careless):
    card: ClassVar[Card] = Careless.card

    def solve(self, weight, scheme, statistics):
        return round_to_nearest(weight, scheme, "mse", statistics["second_moment"].diagonal())


class MovesWhatIsPruned(Careless):
    card: ClassVar[Card] = Careless.card

    def solve(self, weight, scheme, statistics):
        q = round_to_nearest(weight, scheme)
        q.codes[:, ::3] = q.codes[:, ::3].clamp(*scheme.code_range) ^ 1
        return q


class Prunes(PruneMethod):
    """Prunes as it should; the classes below break one thing each."""

    card: ClassVar[Card] = Careless.card

    def prune(self, weight, statistics):
        return weight.masked_fill(choose_zeros(weight.abs(), self.target, "row"), 0.0)


class PrunesPastTheShare(Prunes):
    card: ClassVar[Card] = Careless.card

    def prune(self, weight, statistics):
        return super().prune(weight, statistics).masked_fill(weight.abs() < 0.1, 0.0)


class PrunesInPlace(Prunes):
    card: ClassVar[Card] = Careless.card

    def prune(self, weight, statistics):
        return weight.copy_(super().prune(weight, statistics))


class PrunesByLayer(Prunes):
    card: ClassVar[Card] = Careless.card

    def prune(self, weight, statistics):
        return weight.masked_fill(choose_zeros(weight.abs(), self.target, "layer"), 0.0)


class ForgetsThePattern(Prunes):
    card: ClassVar[Card] = Careless.card

    def prune(self, weight, statistics):
        mask = choose_zeros(weight.abs(), Sparsity(share=self.sparsity), "row")
        return weight.masked_fill(mask, 0.0)


class CompensatesTheWrongWay(Prunes):
    card: ClassVar[Card] = Careless.card
    solve_needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    def prune(self, weight, statistics):
        return 0.5 * super().prune(weight, statistics)


class NoRange(Careless):
    card: ClassVar[Card] = Card(title="Careless", summary="", baseline="rtn", claim="none", row="no-such-row")
    strength: float = 1.0


@pytest.mark.parametrize(
    ("method", "caught"),
    [
        (Random, {"two_runs_are_equal_byte_for_byte", "a_solver_treats_rows_alike"}),
        (RowsSeeEachOther, {"a_solver_treats_rows_alike"}),
        (InPlace, {"a_solver_leaves_its_inputs_alone"}),
        (SaysFourStoresThree, {"a_solver_leaves_its_inputs_alone", "bytes_on_disk_are_the_bytes_claimed"}),
        (Halves, {"a_rewrite_keeps_the_logits"}),
        (IgnoresTheMoment, {"a_solver_is_no_worse_than_nearest"}),
        (NeedsMoreThanItSays, {"missing_text_is_refused_before_any_work"}),
        (MovesWhatIsPruned, {"a_solver_keeps_the_zeros_of_an_earlier_step"}),
        (PrunesPastTheShare, {"a_pruner_zeroes_what_it_says", "zeros_are_in_the_folder"}),
        (PrunesInPlace, {"a_pruner_zeroes_what_it_says"}),
        (PrunesByLayer, {"a_pruner_zeroes_what_it_says", "a_pruner_treats_rows_alike"}),
        (ForgetsThePattern, {"a_pruner_zeroes_what_it_says", "zeros_are_in_the_folder"}),
        (CompensatesTheWrongWay, {"a_pruner_is_no_worse_than_its_zeros"}),
        (NoRange, {"the_card_is_complete", "every_parameter_is_described", "the_claim_is_written"}),
        (
            Careless,
            {"the_file_is_named_after_the_class", "the_docstring_has_all_sections", "the_claim_is_written"},
        ),
    ],
)
def test_the_checks_find_what_they_look_for(method, caught):
    with Trial(method) as trial:
        chosen = [one for one in checks_for(method) if one.__name__ in caught]
        passed = [outcome.name for outcome in (run_check(one, trial) for one in chosen) if outcome.passed]
    assert len(chosen) == len(caught)
    assert not passed


def test_an_expected_failure_must_fail():
    expected = {
        "the_claim_is_written": "it is a test",
        "the_defaults_construct": "wrong",
        "no_such_check": "typo",
    }

    class Expected(Careless):
        card: ClassVar[Card] = Card(title="x", summary="x", expect_fail=expected)

    by_name = {outcome.name: outcome for outcome in check(Expected)}
    assert by_name["the_claim_is_written"].passed
    assert "it is a test" in by_name["the_claim_is_written"].reason
    assert not by_name["the_defaults_construct"].passed
    assert not by_name["no_such_check"].passed


@pytest.mark.parametrize("name", methods())
def test_examples_are_legal_or_not_as_they_should_be(name):
    method = methods()[name]
    assert len(list(variants(method))) >= len(method.model_fields)
    for parameter in method.model_fields:
        assert other_values(method, parameter), f"no example of {parameter}"
        assert len(wrong_values(method, parameter)) >= 1
    with Trial(method) as trial:  # the check of all values is worth something only if most are tried
        tried = [trial.accepts(**{parameter: value}) for parameter, value in variants(method)]
    assert sum(tried) >= 0.7 * len(tried)


def test_the_checks_know_no_method_by_name():
    for module in [name for name in sys.modules if name.startswith("frugallm.conformance")]:
        source = Path(sys.modules[module].__file__).read_text()
        imports = [line for line in source.splitlines() if "import" in line and "quantize." in line]
        assert not any(f"quantize.{name} " in line for line in imports for name in methods()), module
