"""What all tests share: the tiny trained model, made once and kept in pytest's cache."""

import signal
from pathlib import Path

import pytest
import torch

from frugallm.conformance import tiny
from frugallm.models import open_checkpoint


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Handing products as small as those of the tests to more threads takes longer than doing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def interrupts():
    """Whoever starts the tests in the background may have Ctrl-C ignored, and the commands started here inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_cache(request) -> Path:
    return Path(request.config.cache.mkdir("tiny-model"))


@pytest.fixture(scope="session")
def trained_folder(tiny_cache) -> Path:
    """The folder of the tiny trained model."""
    return tiny.tiny_model(tiny_cache)


@pytest.fixture(scope="session")
def trained(trained_folder):
    """The tiny trained model as a checkpoint."""
    return open_checkpoint(trained_folder)


@pytest.fixture(scope="session")
def tiny_bench(tiny_cache):
    """The bench on which the claims of all methods are checked."""
    with tiny.tiny_bench(tiny_cache) as bench:
        yield bench
