"""The second stream: hidden states of the original model beside those of the model as stored, and what compares them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from frugallm.compress.contract import BlockMethod
from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.smoothquant import SmoothQuant
from frugallm.conformance import families
from frugallm.conformance.block_methods import Killed, KilledAfter
from frugallm.conformance.trial import BLOCKS, KINDS, carry_out, job_for, random_model, windows
from frugallm.errors import RecipeError
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.formats.stored import model_in_memory
from frugallm.models.in_memory import InMemory
from frugallm.models.open import dense_model
from frugallm.walk.statistics import CrossMoment
from frugallm.walk.walk import Walk

SEEN: list[Mapping[str, Tensor]] = []


class Compares(BlockMethod):
    """Rounds weights that were moved by what the inputs have moved: depends on both streams to the last bit."""

    solves: ClassVar[Literal["step", "default", "no"]] = "step"
    solve_needs: ClassVar[frozenset[str]] = frozenset({"cross_moment", "second_moment"})

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return one scale a row."""
        return WeightScheme(bits=4)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round what makes up for the inputs' moving, roughly."""
        SEEN.append(statistics)
        h = statistics["second_moment"]
        moved = weight @ statistics["cross_moment"] / h.diagonal().mean()
        return round_to_nearest(weight + moved, scheme)


def inputs_of(model, tokens):
    """Inputs of every linear of every block, ``(tokens, in)``, as the plain model sees them."""
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1).clone()), prepend=True
            )
    with torch.no_grad():
        model(tokens)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_cross_moments_compare_inputs_as_stored_with_those_of_the_original(kind, tmp_path):
    SEEN.clear()
    checkpoint = InMemory(random_model(kind))
    job = job_for(checkpoint, [Compares()], windows(kind), stored=torch.float32)
    run = carry_out(job, tmp_path / "out")
    stored = inputs_of(model_in_memory(run.place.stored(job)), windows(kind))
    original = inputs_of(dense_model(checkpoint), windows(kind))
    sites = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    names = [f"model.layers.{index}.{site}" for index in range(BLOCKS) for site in sites]
    assert len(SEEN) == len(names)
    for name, statistics in zip(names, SEEN):
        x, before = stored[name].double(), original[name].double()
        direct = (before - x).T @ x / len(x)
        got = statistics["cross_moment"].double()
        assert (got - direct).abs().max() <= 1e-4 * x.square().mean() + 1e-3 * direct.abs().max()
    assert SEEN[0]["cross_moment"].abs().max() == 0  # nothing has moved in front of the first site
    assert SEEN[-1]["cross_moment"].abs().max() > 1e-3 * SEEN[-1]["second_moment"].abs().max()


def test_inputs_of_the_original_come_in_the_basis_of_the_smoothed_block(tmp_path):
    SEEN.clear()
    checkpoint = InMemory(random_model("tied"))
    steps = [SmoothQuant(activation="token"), Compares()]
    job = job_for(checkpoint, steps, windows("tied"), stored=torch.float32)
    run = carry_out(job, tmp_path / "out").place.stored(job)
    norm = "model.layers.0.input_layernorm.weight"
    assert (run.tensor(norm) / checkpoint.tensor(norm) - 1).abs().max() > 0.1
    # The first inputs have not moved; unsmoothed, those of the original would be some times as large.
    assert SEEN[0]["cross_moment"].abs().max() <= 1e-5 * SEEN[0]["second_moment"].abs().max()


def test_cross_moment_of_pieces_is_that_of_the_whole():
    x, o = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    moment = CrossMoment(6)
    for piece in (slice(0, 7), slice(7, 40)):
        moment.add(x[piece], o[piece])
    direct = (o.double() - x.double()).T @ x.double() / 40
    torch.testing.assert_close(moment.value().double(), direct, rtol=1e-5, atol=1e-6)
    assert not CrossMoment(3).value().any()


@pytest.mark.parametrize("limit", [2**30, 0])
def test_the_second_stream_is_that_of_the_plain_model(limit, tmp_path):
    checkpoint = InMemory(random_model("tied"))
    steps = [Compares()]
    plan = make_plan(steps, checkpoint)
    options = {"fast": torch.float32, "stored": torch.float32, "hidden_limit": limit}
    walk = Walk(checkpoint, plan, windows("tied"), tmp_path, **options)
    walk.embed(lambda start, stop: 0.9 * checkpoint.rows("model.embed_tokens.weight", start, stop))
    with torch.no_grad():
        states = dense_model(checkpoint).model(windows("tied"), output_hidden_states=True).hidden_states
    assert walk.original is not None
    assert torch.equal(walk.original.values, states[0])  # of the table as it was, not as it is stored
    walk.solve(0)
    assert (walk.original.values - states[1]).abs().max() <= 1e-5 * states[1].abs().max()
    assert (walk.hidden.values - states[1]).abs().max() > 1e-2 * states[1].abs().max()
    walk.close()
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("blocks", range(1, BLOCKS + 1))
def test_a_killed_run_takes_both_streams_up_again(blocks, tmp_path):
    steps = [SmoothQuant(activation="token"), Compares()]
    job = job_for(InMemory(random_model("tied")), steps, windows("tied"))
    whole = carry_out(job, tmp_path / "whole")
    with pytest.raises(Killed):
        carry_out(job, tmp_path / "killed", KilledAfter(blocks))
    assert carry_out(job, tmp_path / "killed", resume=True).digest() == whole.digest()


def test_without_a_step_that_asks_there_is_one_stream(tmp_path):
    checkpoint = InMemory(random_model("tied"))
    walk = Walk(checkpoint, make_plan([RTN()], checkpoint), windows("tied"), tmp_path)
    walk.embed(lambda start, stop: checkpoint.rows("model.embed_tokens.weight", start, stop))
    assert walk.original is None
    walk.close()


def test_tokens_of_experts_cannot_be_compared():
    checkpoint = InMemory(families.variant("mixtral"))
    with pytest.raises(RecipeError, match="down_proj") as error:
        make_plan([Compares()], checkpoint)
    assert "*.down_proj" in error.value.hint
    assert make_plan([Compares(skip=("*.down_proj",))], checkpoint).reads_original
