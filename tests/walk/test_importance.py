"""Importance of channels against the plain model, in float64."""

import pytest
import torch

from frugallm.conformance.trial import KINDS, random_model, windows
from frugallm.models.in_memory import InMemory
from frugallm.models.open import dense_model
from frugallm.walk import importance as module
from frugallm.walk.importance import channel_importance
from frugallm.walk.statistics import Gather


def test_the_mean_square_is_the_diagonal_of_the_second_moment():
    gather = Gather({"mean_square", "second_moment"}, 24)
    x = torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(0)) * torch.arange(24)
    for piece in x:
        gather.add(piece)
    found = gather.values()
    torch.testing.assert_close(found["mean_square"], found["second_moment"].diagonal())
    torch.testing.assert_close(found["mean_square"].double(), x.double().square().mean((0, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_importance_is_the_mean_square_of_what_each_linear_reads(kind, monkeypatch):
    monkeypatch.setattr(module, "fast_dtype", lambda: torch.float32)
    checkpoint = InMemory(random_model(kind))
    model, seen = dense_model(checkpoint), {}
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and ".layers." in name:
            linear.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(
                    f"{name}.weight", args[0].double().square().mean((0, 1))
                )
            )
    with torch.no_grad():
        model(windows(kind))
    found = channel_importance(checkpoint, windows(kind))
    assert found.keys() == seen.keys()
    for name, wanted in seen.items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-9)
