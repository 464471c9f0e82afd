"""Requests through the engine: why answers end, what is refused, cancellation at every stage, faults."""

import sys

import pytest

from frugallm.engine.sampling import SamplingParams
from frugallm.errors import DataError, JobError, ParameterError
from small_engine import END, VOCABULARY, TokenRunner

PROMPT = list(range(2, 40))
LONG = SamplingParams(seed=1, max_tokens=30, ignore_eos=True)
TWO = LONG.model_copy(update={"n": 2})


def answer(engine, prompt, **parameters):
    request = engine.add(
        prompt, SamplingParams(**{"seed": 3, "max_tokens": 24, "ignore_eos": True} | parameters)
    )
    engine.finish(request)
    return request


def only(*tokens):
    """Bias that leaves nothing but these tokens."""
    return dict.fromkeys(tokens, 100.0)


def test_events_add_up_to_the_answer(make_engine, letters):
    request = answer(make_engine(), PROMPT)
    (sequence,) = request.sequences
    events = list(request.events)
    assert [event.token for event in events] == sequence.output
    assert "".join(event.text for event in events) == "".join(sequence.texts)
    assert "".join(sequence.texts) == letters.decode(sequence.output, skip_special_tokens=True)
    assert [event.finish for event in events] == [None] * 23 + ["length"]


@pytest.mark.parametrize("ignore", [False, True])
def test_the_models_end(make_engine, ignore):
    request = answer(make_engine(), PROMPT, logit_bias=only(END), ignore_eos=ignore)
    (sequence,) = request.sequences
    assert (len(sequence.output), sequence.finish) == ((24, "length") if ignore else (1, "stop"))
    assert "".join(sequence.texts) == ""


def test_a_stop_token_ends_an_answer_and_has_no_text(make_engine):
    request = answer(make_engine(), PROMPT, logit_bias=only(5), stop_token_ids=[5])
    (sequence,) = request.sequences
    assert (sequence.output, sequence.finish, sequence.stop, sequence.texts) == ([5], "stop", 5, [""])


def test_a_stop_string_across_tokens(make_engine, letters):
    engine = make_engine()
    whole = "".join(answer(engine, PROMPT).sequences[0].texts)
    word = whole[10:13]
    (sequence,) = answer(engine, PROMPT, stop=["no such text", word]).sequences
    assert (sequence.finish, sequence.stop) == ("stop", word)
    assert "".join(sequence.texts) == whole[: whole.index(word)]


def test_what_was_held_back_comes_when_the_answer_is_long_enough(make_engine):
    (sequence,) = answer(make_engine(), PROMPT, logit_bias=only(2), stop=["a" * 99], max_tokens=7).sequences
    assert "".join(sequence.texts) == "a" * 7


def test_answers_differ_by_choice_and_seed_and_come_again_with_it(make_engine):
    engine = make_engine()
    first = [s.output for s in answer(engine, PROMPT, n=3).sequences]
    assert len({tuple(output) for output in first}) == 3
    assert [s.output for s in answer(engine, PROMPT, n=3).sequences] == first
    assert [s.output for s in answer(engine, PROMPT, seed=4).sequences] != first[:1]
    open_seed = answer(engine, PROMPT, seed=None)
    assert answer(engine, PROMPT, seed=open_seed.seed).sequences[0].output == open_seed.sequences[0].output


def test_further_answers_share_the_prompt(make_engine):
    engine = make_engine()
    answer(engine, PROMPT, n=4, max_tokens=5)
    assert engine.computed == len(PROMPT) + 4 * 4


def test_a_known_prefix_is_not_computed_again(make_engine):
    engine = make_engine()
    answer(engine, PROMPT, max_tokens=1)
    before = engine.computed
    answer(engine, PROMPT, max_tokens=1)
    assert engine.computed - before == len(PROMPT) % engine.blocks.size


@pytest.mark.parametrize(("context", "blocks"), [(45, 40), (256, 3)])
def test_an_answer_ends_where_context_or_cache_does(make_engine, context, blocks):
    (sequence,) = answer(make_engine(context=context, blocks=blocks), PROMPT).sequences
    assert sequence.finish == "length"
    assert len(sequence.tokens) == min(context, blocks * 16)


@pytest.mark.parametrize(
    ("sizes", "prompt", "parameters", "error", "message"),
    [
        ({}, [], {}, DataError, "the prompt is empty"),
        ({}, [2, 61], {}, DataError, "the prompt holds token 61, the model has 61"),
        ({}, [-1], {}, DataError, "the prompt holds token -1"),
        ({"context": 38}, PROMPT, {}, DataError, "the prompt has 38 tokens, the model's context 38"),
        (
            {"blocks": 2},
            PROMPT,
            {},
            DataError,
            "the prompt has 38 tokens, the cache holds 32. Raise cache_tokens",
        ),
        ({"sequences": 2}, PROMPT, {"n": 3}, ParameterError, "n is 3, a step holds 2 sequences"),
        ({}, PROMPT, {"logit_bias": {VOCABULARY: 1}}, ParameterError, "logit_bias names token 61"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(make_engine, sizes, prompt, parameters, error, message):
    engine = make_engine(**sizes)
    with pytest.raises(error, match=message) as caught:
        engine.add(prompt, SamplingParams(**parameters))
    assert "\n" not in str(caught.value)
    assert not engine.requests


def test_a_cache_for_one_serves_many(make_engine):
    engine = make_engine(blocks=5)
    requests = [engine.add(PROMPT, LONG), engine.add(PROMPT[::-1], TWO), engine.add(PROMPT[5:], TWO)]
    engine.finish(*requests)
    assert {s.finish for r in requests for s in r.sequences} == {"length"}
    assert engine.scheduler.preemptions > 0


def test_an_answer_waits_for_no_long_prompt(make_engine):
    engine = make_engine(step=8)
    short = engine.add([3], LONG)
    engine.step()
    engine.add(PROMPT * 4, LONG)
    for _ in range(10):
        engine.step()
    assert len(short.sequences[0].output) == 11


def test_cancelled_at_every_stage(make_engine):
    """Before, between and behind any steps, of requests that wait, read, fork, answer, or are sent out again."""
    for stage in range(14):
        engine = make_engine(blocks=6, step=16)
        requests = [engine.add(PROMPT, TWO), engine.add(PROMPT, LONG), engine.add(PROMPT[::-1], TWO)]
        for _ in range(stage):
            engine.step()
        for request in (requests[stage % 3], requests[(stage + 1) % 3]):
            engine.cancel(request)
            engine.check()
            assert request.finished and {s.finish for s in request.sequences} == {"cancelled"}
            assert request.events[-1].finish == "cancelled"
            engine.cancel(request)  # once more changes nothing
        engine.step()
        engine.cancel(requests[(stage + 2) % 3])
        engine.check()
        assert engine.blocks.free == engine.blocks.count and not engine.requests


def test_a_cancelled_neighbour_changes_no_answer(make_engine):
    expected = answer(make_engine(), PROMPT).sequences[0].output
    engine = make_engine(blocks=7, step=16)
    other = engine.add(PROMPT, TWO)
    engine.step()
    kept = engine.add(PROMPT, SamplingParams(seed=3, max_tokens=24, ignore_eos=True))
    for _ in range(6):
        engine.step()
    engine.cancel(other)
    engine.finish(kept)
    assert kept.sequences[0].output == expected


class Failing(TokenRunner):
    """Fails once, in the middle of its third step, when part of the cache is written."""

    calls = 0

    def step(self, *parts):
        self.calls += 1
        logits = super().step(*parts)
        if self.calls == 3:
            self.cache[:] = 7
            raise JobError("out of order")
        return logits


def test_a_fault_ends_all_requests_and_leaves_nothing_behind(make_engine):
    engine = make_engine(runner=Failing(40))
    expected = answer(make_engine(), PROMPT).sequences[0].output
    requests = [engine.add(PROMPT, TWO), engine.add(PROMPT[:20], LONG)]
    with pytest.raises(JobError, match="out of order"):
        engine.finish(*requests)
    assert {s.finish for r in requests for s in r.sequences} == {"fault"}
    assert engine.blocks.free == engine.blocks.count
    engine.check()
    assert answer(engine, PROMPT).sequences[0].output == expected


def test_a_form_without_the_library_names_it(make_engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ParameterError, match=r"regex needs the package llguidance. Install it: pip install"):
        make_engine().add(PROMPT, SamplingParams(regex="a"))
