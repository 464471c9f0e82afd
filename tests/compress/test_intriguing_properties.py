"""Intriguing Properties: what the step sets, and that it reaches the training."""

import pytest
import torch

from frugallm.compress.quantize.intriguing_properties import IntriguingProperties
from frugallm.conformance.trial import random_model
from frugallm.errors import RecipeError
from frugallm.models.family import family_of
from frugallm.training.loop import method_arguments


def test_weight_decay_and_clipping_reach_the_trainer():
    step = IntriguingProperties(weight_decay=0.02, gradient_clipping=0.0)
    assert method_arguments([step]) == {"weight_decay": 0.02, "max_grad_norm": 0.0}


def test_two_steps_that_set_the_same_differently_are_refused():
    from frugallm.compress.quantize.bitnet import BitNet

    with pytest.raises(RecipeError, match="sets weight_decay to"):
        method_arguments([BitNet(), IntriguingProperties(weight_decay=0.05)])
    assert method_arguments([BitNet(), IntriguingProperties()])["weight_decay"] == 0.1


def test_dropout_is_on_what_sublayers_add_and_in_training_alone():
    model, ids = random_model("tied"), torch.arange(20)[None]
    family = family_of(model.config)
    plain = model(ids).logits
    IntriguingProperties(dropout=0.5).rewrite(model, family)
    assert torch.equal(model(ids).logits, plain)
    kept = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda m, i, out: kept.append(out))
    model.train()
    model(ids)
    hook.remove()
    (out,) = kept
    assert (out == 0).float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_products_are_in_the_type_asked_for(dtype):
    seen = []
    model = random_model("tied")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    with IntriguingProperties(dtype=dtype).context():
        model(torch.arange(8)[None])
    assert seen == [getattr(torch, dtype)]


def test_remarks_say_how_uneven_inputs_are():
    model = random_model("tied")
    (line,) = IntriguingProperties().remarks(model, family_of(model.config), torch.arange(40).view(2, 20))
    assert "kurtosis" in line and "channel ratio" in line
