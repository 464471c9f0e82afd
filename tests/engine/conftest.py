"""Engines that must have all their blocks again at the end of a test."""

import pytest

from small_engine import letters_tokenizer, small_engine
from tiny_decoders import tiny


@pytest.fixture(scope="session")
def letters():
    return letters_tokenizer()


@pytest.fixture(scope="session")
def small_llama():
    return tiny("llama")


@pytest.fixture
def make_engine(small_llama, letters):
    made = []

    def make(model=None, **sizes):
        made.append(small_engine(model or small_llama, letters, **sizes))
        return made[-1]

    yield make
    for engine in made:
        for request in tuple(engine.requests):
            engine.cancel(request)
        engine.check()
        assert engine.blocks.free == engine.blocks.count
        assert not engine.scheduler.waiting and not engine.scheduler.running and not engine.requests
