"""Hundreds of requests that come, go and are cancelled at random: every answer right, no block lost."""

import random

import pytest

from frugallm.engine.sampling import SamplingParams


def draw_request(draw):
    """A prompt with a beginning that others have too, and parameters."""
    begin = [[5, 6, 7, 8] * 8, [9] * 17, [3, 4] * 20][draw.randrange(3)]
    prompt = begin[: draw.randrange(1, 40)] + [draw.randrange(2, 61) for _ in range(draw.randrange(6))]
    greedy = draw.random() < 0.3
    return prompt, SamplingParams(
        temperature=0 if greedy else 1.5,
        seed=draw.randrange(4),
        n=1 if greedy else draw.randrange(1, 4),
        max_tokens=draw.randrange(1, 24),
        repetition_penalty=draw.choice([1.0, 1.3]),
        stop=draw.choice([(), ("a",), ("bc", "c!")]),
    )


def seen(request):
    return [(s.output, s.texts, s.finish, s.stop) for s in request.sequences]


@pytest.mark.parametrize("seed", range(4))
def test_every_answer_is_the_one_it_would_be_alone(make_engine, seed):
    draw = random.Random(seed)
    engine = make_engine(
        blocks=draw.choice([6, 9, 30]), step=draw.choice([1, 9, 40]), sequences=draw.choice([3, 8])
    )
    asked, live, cancelled = [], [], 0
    while len(asked) < 120 or engine.requests:
        if len(asked) < 120 and draw.random() < 0.6:
            asked.append(engine.add(*draw_request(draw)))
            live.append(asked[-1])
        if live and draw.random() < 0.05:
            engine.cancel(live.pop(draw.randrange(len(live))))
            cancelled += 1
        if draw.random() < 0.03:
            for sequence in reversed(tuple(engine.scheduler.running)):
                engine.scheduler.preempt(sequence)
        engine.step()
        live = [request for request in live if not request.finished]
    assert cancelled > 5 and engine.scheduler.preemptions > 0
    for request in asked:
        if any(sequence.finish == "cancelled" for sequence in request.sequences):
            continue
        alone = make_engine(blocks=engine.blocks.count)
        expected = alone.add(request.prompt, request.params)
        alone.finish(expected)
        assert seen(request) == seen(expected)
