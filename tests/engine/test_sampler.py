"""The choice of a token: each parameter against what it says, and the random numbers."""

import numpy as np
import pytest

from frugallm.engine.sampler import choose, drawn, filtered, logprobs, penalized, uniform
from frugallm.engine.sampling import SamplingParams
from frugallm.errors import ParameterError

LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))


def shares(**parameters):
    weights = dense(LOGITS, SamplingParams(**parameters))
    return (weights / weights.sum()).round(6).tolist()


def dense(logits, params):
    """Weights of all tokens."""
    ids, weights = filtered(logits, params)
    found = np.zeros(len(logits))
    found[slice(None) if ids is None else ids] = weights
    return found


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [0.533333, 0.3, 0.133333, 0.033333]),
        ({"top_k": 2}, [0.571429, 0.428571, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.65}, [0.571429, 0.428571, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"min_p": 0.45}, [0.444444, 0.333333, 0.222222, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0.571429, 0.428571, 0, 0]),
        ({"temperature": 1e-9}, [1, 0, 0, 0]),
        ({"temperature": 1e-320, "top_p": 0.5}, [1, 0, 0, 0]),
    ],
)
def test_filters(parameters, expected):
    assert shares(**parameters) == pytest.approx(expected, abs=1e-5)


def by_full_sorts(logits, params):
    """The tokens that the filters keep, in the plainest way."""
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[order] - logits.max()).astype(np.float64) / params.temperature)
    kept = (
        np.ones(len(logits), bool) if not params.top_k else logits[order] >= logits[order[params.top_k - 1]]
    )
    total = np.where(kept, weights, 0).cumsum()
    if params.top_p < 1:
        kept &= total - weights < params.top_p * total[-1]
    kept &= weights >= params.min_p
    return order[kept]


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("top_p", [1.0, 0.05, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("others", [{}, {"temperature": 3.0}, {"top_k": 40}, {"top_k": 300, "min_p": 0.01}])
def test_filters_keep_what_full_sorts_keep(others, top_p, equal):
    logits = np.random.default_rng(0).normal(0, 2, 6000).astype(np.float32)
    logits = logits.round(1) if equal else logits
    params = SamplingParams(top_p=top_p, **others)
    found = np.flatnonzero(dense(logits, params))
    expected = np.sort(by_full_sorts(logits, params))
    # The sums of both round differently, so the last token may be in one of them only.
    assert len(np.setxor1d(found, expected)) <= 1
    assert dense(logits, params)[found] == pytest.approx(
        np.exp((logits[found] - logits.max()).astype(np.float64) / params.temperature), rel=1e-5
    )


def test_a_nucleus_takes_the_first_of_equals():
    ids, _ = filtered(np.zeros(100, np.float32), SamplingParams(top_p=0.25))
    assert ids.tolist() == list(range(25))


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_draws_are_those_of_cumulated_weights(size):
    random = np.random.default_rng(size)
    weights = random.random(size) * (random.random(size) < 0.5)
    weights[size // 2] = 1.0
    total = weights.cumsum()
    for number in (0.0, *random.random(50), 1 - 1e-16):
        place = drawn(weights, number)
        assert weights[place] > 0
        assert total[place] >= number * total[-1] * (1 - 1e-12)
        assert total[place] - weights[place] <= number * total[-1] * (1 + 1e-12)


def test_penalties():
    logits = np.array([2.0, -2.0, 1.0, 0.5], np.float32)
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    # token 0 in the prompt, 1 once and 2 twice in the answer
    changed = penalized(logits, params, [0, 0], [1, 2, 2])
    assert changed.tolist() == [1.0, -4.0 - 0.75, 0.5 - 1.0, 0.5]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5]


def test_greedy_takes_the_likeliest_and_the_lowest_of_equals():
    params = SamplingParams(temperature=0)
    assert choose(np.array([1, 5, 5, 0], np.float32), params, [0], [], 0) == 1
    assert choose(LOGITS, params.model_copy(update={"logit_bias": {3: 100.0}}), [0], [], 0) == 3
    banned = SamplingParams(temperature=0, logit_bias={0: -100.0})
    assert choose(LOGITS, banned, [0], [], 0) == 1


def test_only_allowed_tokens_are_chosen():
    allowed = np.array([False, False, True, True])
    drawn = {choose(LOGITS, SamplingParams(), [0] * i, [], 7, 0, allowed) for i in range(50)}
    assert drawn == {2, 3}


def test_draws_follow_the_distribution():
    counts = np.bincount([choose(LOGITS, SamplingParams(), [0] * i, [], 5) for i in range(2000)], minlength=4)
    expected = 2000 * np.array([0.4, 0.3, 0.2, 0.1])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, 0.1 %


def test_a_random_number_belongs_to_seed_choice_and_position():
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    numbers = {uniform(s, c, p) for s in range(4) for c in range(4) for p in range(50)}
    assert len(numbers) == 800 and all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 800 - 0.5) < 0.05


def test_position_counts_prompt_and_answer():
    params = SamplingParams()
    flat = np.zeros(1000, np.float32)
    assert choose(flat, params, [1, 2], [3], 9) == choose(flat, params, [1], [2, 3], 9)


def test_the_likeliest_beside_a_token_are_those_of_a_full_sort():
    logits = np.random.default_rng(1).normal(0, 2, 3000).astype(np.float32).round(1)  # many are equal
    for count in (1, 20, 100):
        top = [token for token, _ in logprobs(logits, 0, count).top]
        assert top == np.argsort(-logits, kind="stable")[:count].tolist()
    assert len(logprobs(LOGITS, 0, 100).top) == 4


def test_logprobs_are_those_of_the_model():
    found = logprobs(LOGITS + 3, 2, 2)
    assert found.logprob == pytest.approx(np.log(0.2), abs=1e-6)
    assert [token for token, _ in found.top] == [0, 1]
    assert found.top[0][1] == pytest.approx(np.log(0.4), abs=1e-6)
    assert logprobs(LOGITS, 0, 0).top == ()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": -1}, "temperature must be greater than or equal to 0; got -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temprature": 1}, "sampling has no parameter 'temprature'. Did you mean 'temperature'?"),
        ({"top_p": 0}, "top_p must be greater than 0; got 0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"min_p": 2}, "min_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"seed": -1}, "seed must be"),
        ({"n": 0}, "n must be"),
        ({"n": 2, "temperature": 0}, "n is 2 with temperature 0: all answers would be the same"),
        ({"stop": ["a", ""]}, "stop holds an empty string"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must be"),
        ({"presence_penalty": 3}, "presence_penalty must be"),
        ({"logit_bias": {1: 1e300}}, "logit_bias must be less than or equal to 1000000000; got 1e+300"),
        ({"repetition_penalty": 0}, "repetition_penalty must be"),
        ({"repetition_penalty": 1e300}, "repetition_penalty must be less than or equal to 100"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty must be greater than or equal to 0.01"),
        ({"logprobs": 1000}, "logprobs must be"),
    ],
)
def test_impossible_parameters_end_in_one_clear_line(parameters, message):
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**parameters)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_that_the_model_lacks():
    with pytest.raises(ParameterError, match="logit_bias names token 99, the model has 61"):
        SamplingParams(logit_bias={99: 1.0}).check_tokens(61)
    with pytest.raises(ParameterError, match="stop_token_ids names token -1"):
        SamplingParams(stop_token_ids=[-1]).check_tokens(61)


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="end").stop == ("end",)
