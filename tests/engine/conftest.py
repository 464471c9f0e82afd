"""Engines that must have all their blocks again at the end of a test."""

import pytest

from small_engine import letters_tokenizer, small_engine


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Answers are compared with those of the plain model, whose arithmetic native kernels do not share."""
    monkeypatch.setenv("FRUGAL_KERNELS", "reference")


@pytest.fixture(scope="session")
def letters():
    return letters_tokenizer()


@pytest.fixture(scope="session")
def small_llama():
    from tiny_decoders import tiny

    return tiny("llama")


@pytest.fixture
def make_engine(letters):
    """Make an engine on tokens, or on a runner, or on what makes one with so many blocks."""
    made = []

    def make(runner=None, blocks=40, **sizes):
        runner = runner(blocks) if callable(runner) else runner
        made.append(small_engine(letters, runner, blocks, **sizes))
        return made[-1]

    yield make
    for engine in made:
        for request in tuple(engine.requests):
            engine.cancel(request)
        engine.check()
        assert engine.blocks.free == engine.blocks.count
        assert not engine.scheduler.waiting and not engine.scheduler.running and not engine.requests
