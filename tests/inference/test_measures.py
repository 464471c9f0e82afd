"""What claims about answering measure with gives what it says."""

import pytest
import torch

from frugallm.conformance.trial import random_model, windows
from frugallm.evaluate.memory import extra_bytes
from frugallm.evaluate.predictions import Predictions, compare_window
from frugallm.inference.integer_products import IntegerProducts
from frugallm.inference.integer_products import verdict as integer_verdict
from frugallm.inference.measures import (
    RunnerPredictions,
    attention_inputs,
    in_turn,
    plain_pace,
    seconds_of,
)
from frugallm.inference.tiled_attention import LENGTHS, by_matrix, error, fused, text_of
from frugallm.inference.tiled_attention import verdict as tiled_verdict
from frugallm.kernels import library, operations
from frugallm.models.in_memory import InMemory
from frugallm.threads import threads


def test_arms_take_turns_and_a_first_round_does_not_count():
    calls = []
    arms = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert in_turn(arms, 2) == {"a": [3, 5], "b": [4, 6]}
    assert "".join(calls) == "ababab"
    assert 0 <= seconds_of(lambda: None) < 0.1


def test_torch_has_its_threads_again():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_memory_beside_what_is_there_is_the_peak_and_not_what_is_left():
    kept = torch.ones(10_000_000)  # 40 MB

    def work():
        return (kept + 1).mul(2)[:1].clone()

    assert extra_bytes(work) == pytest.approx(80e6, rel=0.05)
    assert extra_bytes(lambda: None) < 2e6


def test_the_middle_layers_attention_is_recorded_and_the_model_left_as_it_was():
    model, tokens = random_model("untied"), windows("untied")[0]
    model.set_attn_implementation("eager")
    before = model(tokens[None]).logits
    seen = {}
    attention = model.model.layers[1].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda _, given: seen.update(output=given[0]))
    model(tokens[None])
    hook.remove()
    queries, keys, values, scale = attention_inputs(model, tokens)
    assert queries.shape == (8, 48, 16) and keys.shape == values.shape == (2, 48, 16) and scale == 0.25
    heads = [by_matrix(q, keys[i // 4], values[i // 4], scale) for i, q in enumerate(queries)]
    torch.testing.assert_close(torch.cat(heads, 1), seen["output"][0], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(tokens[None]).logits, before)


@pytest.mark.skipif(not library.usable_paths(), reason="the native kernels are not built")
def test_three_ways_to_compute_attention_are_one():
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 700, 24, generator=generator)
    exact = [x.bfloat16() for x in (q, k, v)]
    places = torch.arange(700, dtype=torch.int32)
    tiled = operations.attend(q, k, v, places, 0.3, path=library.usable_paths()[-1])
    assert error(by_matrix(*(x.float() for x in exact), 0.3), q, k, v, 0.3) < 1e-12
    assert error(fused(*(x.float() for x in exact), 0.3)[0, 0], q, k, v, 0.3) < 1e-12
    assert error(tiled, q, k, v, 0.3) < 1e-5
    assert error(tiled, q, k, v, 0.31) > 1e-5
    assert error(tiled.flip(0), q, k, v, 0.3) > 0.1


@pytest.mark.skipif(not library.usable_paths(), reason="the native kernels are not built")
def test_a_runner_is_compared_like_any_model():
    model, window = random_model("tied"), windows("tied")[0]
    runner = IntegerProducts().runner(InMemory(model), 3, path=library.usable_paths()[-1])
    engine, plain = RunnerPredictions(runner), Predictions(model)
    _, kl, top1 = compare_window(engine, engine.states(window), window, plain, plain.states(window))
    assert 0 < kl < 1e-3 and top1 > 0.9  # weights and inputs in floats: what is left is the cache in bf16


def test_the_pace_of_a_plain_model():
    assert 1 < plain_pace(random_model("tied"), windows("tied")[0], 5) < 1e5


def test_a_text_begins_again_where_it_is_too_short():
    assert text_of(torch.tensor([[1, 2], [3, 4]]), 7).tolist() == [1, 2, 3, 4, 1, 2, 3]


class Named:
    model_name = "m"


def arms(tiled, matrix=(10e6, 40e6, 160e6), seconds=(0.01, 0.1)):
    return {
        length: {
            "tiled": {"bytes": small, "seconds": seconds[0]},
            "matrix": {"bytes": large, "seconds": seconds[1]},
        }
        for length, small, large in zip(LENGTHS, tiled, matrix, strict=True)
    }


LINEAR = (1e6, 2e6, 4e6)


@pytest.mark.parametrize(
    ("found", "apart", "reason"),
    [
        (arms(LINEAR), 1e-6, ""),
        (arms(LINEAR), 2e-5, "squared error is 2.0e-05"),
        (arms((1e6, 4e6, 16e6)), 1e-6, "4.0 times the memory"),
        (arms(LINEAR, LINEAR), 1e-6, "more memory"),
        (arms(LINEAR, seconds=(0.2, 0.1)), 1e-6, "slower"),
    ],
)
def test_the_verdict_on_attention(found, apart, reason):
    claim = tiled_verdict(Named, found, apart, {})
    assert claim.passed == (not reason) and reason in claim.reason
    assert claim.value == 1e-6 * found[LENGTHS[-1]]["tiled"]["bytes"] and claim.better == "lower"


PACE = {"packed": [90.0, 100.0, 110.0], "transformers": [20.0, 30.0, 25.0]}


@pytest.mark.parametrize(
    ("pace", "size", "ratio", "reason"),
    [
        (PACE, 30, 1.001, ""),
        (PACE | {"transformers": [20.0, 95.0, 25.0]}, 30, 1.001, "not faster"),
        (PACE, 60, 1.001, "0.60 of the memory"),
        (PACE, 30, 1.02, "perplexity times 1.0200"),
        (PACE, 30, float("nan"), "perplexity times nan"),
    ],
)
def test_the_verdict_on_integer_products(pace, size, ratio, reason):
    cost = {"kl": 0.01, "perplexity": ratio}
    claim = integer_verdict(Named, pace, {"packed": size, "transformers": 100}, cost, {})
    assert claim.passed == (not reason) and reason in claim.reason
    assert (claim.value, claim.baseline_value, claim.better) == (100.0, 25.0, "higher")
