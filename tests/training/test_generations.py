"""Text that a model writes itself."""

import pytest
import torch

from frugallm.conformance.trial import random_model
from frugallm.training.generations import generated


@pytest.fixture(scope="module")
def model():
    return random_model("tied")


def test_windows_begin_with_every_token_and_depend_on_the_seed_alone(model):
    one = generated(model, 70, 9, greedy=3, seed=1)
    assert one.shape == (70, 9)
    assert sorted(one[:67, 0].tolist()) == list(range(67))
    assert torch.equal(one, generated(model, 70, 9, greedy=3, seed=1))
    assert not torch.equal(one, generated(model, 70, 9, greedy=3, seed=2))


def test_the_first_tokens_are_the_likeliest_and_the_rest_are_drawn(model):
    windows = generated(model, 40, 24, greedy=3, seed=0)
    with torch.inference_mode():
        likeliest = model(windows).logits.argmax(-1)[:, :-1]  # without a cache
    hit = (likeliest == windows[:, 1:]).float().mean(0)
    assert (hit[:3] == 1).all()
    assert hit[3:].mean() < 0.9


def test_draws_follow_the_models_distribution(model):
    starts = torch.zeros(2000, 1, dtype=torch.long)
    from frugallm.training.generations import _write

    drawn = _write(model, starts[:, 0], 2, 0, torch.Generator().manual_seed(0))[:, 1]
    with torch.inference_mode():
        p = model(starts[:1]).logits[0, 0].softmax(-1)
    counts = torch.bincount(drawn, minlength=67) / 2000
    assert (counts - p).abs().max() < 4 * (0.25 / 2000) ** 0.5
