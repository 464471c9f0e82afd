"""Answers that follow a schema, an expression or a grammar, alone and beside free ones."""

import json
import re

import pytest

from frugallm.engine.sampling import SamplingParams
from frugallm.errors import ParameterError

PROMPT = [4, 5, 6]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["abc", "ada"]},
        "ages": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}
FORMS = {
    "json_schema": SCHEMA,
    "regex": "[a-c]{3}[0-9]{2,4}",
    "grammar": 'start: "yes" | "no" " " start',
}


def text(request):
    return ["".join(sequence.texts) for sequence in request.sequences]


@pytest.fixture(autouse=True)
def _library():
    pytest.importorskip("llguidance")


@pytest.mark.parametrize("form", FORMS)
def test_answers_follow_the_form_whatever_is_beside_them(make_engine, form):
    params = SamplingParams(seed=1, n=4, max_tokens=80, **{form: FORMS[form]})
    alone, engine = make_engine(), make_engine(blocks=9, step=9)
    expected = alone.add(PROMPT, params)
    alone.finish(expected)
    free = engine.add(PROMPT * 4, SamplingParams(seed=5, max_tokens=60, ignore_eos=True))
    request = engine.add(PROMPT, params)
    engine.finish(free, request)
    assert text(request) == text(expected)
    assert len(set(text(request))) > 1
    for answer, sequence in zip(text(request), request.sequences):
        if sequence.finish == "length":
            continue
        if form == "json_schema":
            found = json.loads(answer)
            assert found["name"] in ("abc", "ada") and set(found["ages"]) <= {True, False}
        elif form == "regex":
            assert re.fullmatch(FORMS[form], answer)
        else:
            assert re.fullmatch("(no )*yes", answer)
    assert any(sequence.finish == "stop" for sequence in request.sequences)


def test_greedy_takes_the_likeliest_allowed_token(make_engine):
    engine = make_engine()
    request = engine.add(PROMPT, SamplingParams(temperature=0, regex="[xyz]", logprobs=60))
    engine.finish(request)
    (sequence,) = request.sequences
    ranked = [engine.tokenizer.decode([token]) for token, _ in sequence.logprobs[0].top]
    assert text(request) == [next(letter for letter in ranked if letter in "xyz")]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"json_schema": {"type": "objekt"}}, "json_schema cannot be understood (Invalid type: objekt)"),
        ({"json_schema": "{"}, "json_schema cannot be read"),
        ({"regex": "("}, "regex cannot be understood"),
        ({"grammar": "start: foo"}, "grammar cannot be understood"),
    ],
)
def test_a_form_that_cannot_be_understood_is_one_clear_line(make_engine, parameters, message):
    engine = make_engine()
    with pytest.raises(ParameterError) as caught:
        engine.add(PROMPT, SamplingParams(**parameters))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not engine.requests


@pytest.mark.parametrize(
    ("regex", "so_far", "reason"),
    [
        ("aé", "a", "NoExtensionBias"),
        ("é", "", "NoExtensionBias"),
        ("a{1000000}", "a", "too many expressions"),
    ],
)
def test_a_form_that_cannot_be_followed_ends_its_answers_and_no_others(make_engine, regex, so_far, reason):
    """The tokenizer has no token for é, and the library cannot count that far."""
    free = SamplingParams(seed=5, max_tokens=12, ignore_eos=True)
    alone, engine = make_engine(), make_engine()
    expected = alone.add(PROMPT, free)
    alone.finish(expected)
    stuck = engine.add(PROMPT, SamplingParams(seed=1, n=2, regex=regex))
    other = engine.add(PROMPT, free)
    engine.finish(stuck, other)
    assert text(other) == text(expected)
    assert text(stuck)[0] == so_far and text(stuck)[1] in (so_far, "")
    assert {sequence.finish for sequence in stuck.sequences} == {"fault"}
    assert stuck.events[-1].finish == "fault"
    message = str(stuck.fault)
    assert message.startswith("the regex cannot be followed any further") and reason in message
    assert "<state>" not in message


def test_two_forms_cannot_go_together():
    with pytest.raises(ParameterError, match="json_schema and regex cannot go together"):
        SamplingParams(json_schema={}, regex="a")
