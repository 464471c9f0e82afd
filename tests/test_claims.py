"""Every method's claim, checked on the tiny model, reaches the verdict that its card records."""

import math

import pytest
import torch

from frugallm.catalogue import methods
from frugallm.conformance import tiny
from frugallm.models import dense_model


@pytest.mark.claim
@pytest.mark.parametrize("name", methods())
def test_claim(name, tiny_bench):
    if needs := methods()[name].claim_needs():
        pytest.skip(f"it needs {needs}")
    card = methods()[name].card
    claim = methods()[name].claim(tiny_bench)
    print(f"{name}: {claim.metric} {claim.value:.4g}, {claim.baseline}: {claim.baseline_value:.4g}")
    assert claim.passed == card.holds, f"{claim.reason} {claim.details}"
    assert not claim.passed or claim.value < claim.baseline_value or claim.better == "higher"
    assert claim.model in (tiny_bench.model_name, tiny_bench.training.name)


@pytest.mark.claim
def test_the_tiny_model_has_learned_its_text(tiny_bench):
    evaluation = tiny_bench.evaluate(methods()["rtn"](bits=8))
    untrained = tiny.SHAPE["vocab_size"]
    assert evaluation.perplexity.value < untrained / 5
    assert evaluation.kl.value < 0.02


@pytest.mark.claim
def test_models_trained_for_claims_have_learned_their_text(tiny_bench):
    training = tiny_bench.training
    vocabulary = training.config().vocab_size
    assert math.exp(training.loss(training.train([]))) < vocabulary / 5


def test_outliers_are_planted_without_changing_the_function(trained):
    model = dense_model(trained, torch.float32)
    ids = torch.arange(3, 67)[None]
    before = model(ids).logits
    gains = model.model.layers[0].input_layernorm.weight.clone()
    tiny.plant_outliers(model)
    after = model(ids).logits
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert (model.model.layers[0].input_layernorm.weight / gains).amax() >= tiny.OUTLIERS["least"]
    assert (gains.abs().amax() / gains.abs().median()) > 5  # those planted after training
