"""How uneven inputs are."""

import pytest
import torch

from frugallm.conformance.trial import random_model
from frugallm.models.family import family_of
from frugallm.training.quantizability import input_spreads, spread


def test_kurtosis_and_ratio_are_those_of_the_definition():
    normal = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert spread(normal).kurtosis == pytest.approx(3, abs=0.15)
    outlier = normal.clone()
    outlier[:, 3] *= 50
    uneven = spread(outlier)
    assert uneven.kurtosis > 30
    median = outlier.abs().amax(0).median()
    assert uneven.channel_ratio == pytest.approx(float(outlier.abs().amax() / median), rel=1e-6)


def test_all_linears_are_seen_and_hooks_are_gone():
    model = random_model("tied")
    family = family_of(model.config)
    found = input_spreads(model, family, torch.arange(20)[None])
    assert len(found) == 7 * model.config.num_hidden_layers
    layer = model.model.layers[0]
    assert found["model.layers.0.self_attn.q_proj"] == found["model.layers.0.self_attn.k_proj"]
    assert not layer.mlp.up_proj._forward_pre_hooks
