"""Rotated: the same function in another basis, for every family whose norms allow it."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_llama import tiny_model

from frugallm.conformance.families import VARIANTS, tokens, variant
from frugallm.errors import ModelError
from frugallm.models import InMemory, dense_model
from frugallm.models.rotated import Rotated

LEGAL = [name for name in VARIANTS if name != "gemma3"]
CENTERED = ("gpt2", "opt", "gpt_neox")


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("name", LEGAL)
def test_the_logits_stay_in_every_family(name):
    model = variant(name)
    base = InMemory(model)
    rotated = Rotated(base)
    rotated.validate()
    before, after = logits(model), logits(dense_model(rotated))
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    for path in base.linears():
        weight = f"{path}.weight"
        assert not torch.allclose(base.tensor(weight), rotated.tensor(weight), atol=1e-2), path


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox, one after the other"])
def test_the_logits_stay_with_every_kind_of_matrix(name, heads, kind):
    model = variant(name)
    before = logits(model)
    after = logits(dense_model(Rotated(InMemory(model), 3, kind=kind, heads=heads)))
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()


def test_norms_behind_the_sublayers_are_refused():
    with pytest.raises(ModelError, match=r"gemma3_text.*cannot be rotated.*post_attention_layernorm"):
        Rotated(InMemory(variant("gemma3")))


def test_a_bias_behind_a_gain_of_zero_is_refused():
    model = variant("gpt2")
    model.transformer.h[1].ln_2.weight.data[5] = 0
    with pytest.raises(
        ModelError, match=r"channel 5 of transformer\.h\.1\.ln_2 has a bias and a gain of zero"
    ):
        Rotated(InMemory(model))
    model.transformer.h[1].ln_2.bias.data[5] = 0
    before, after = logits(model), logits(dense_model(Rotated(InMemory(model))))
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()


def test_the_head_is_untied_and_the_given_model_stays_tied():
    base = InMemory(tiny_model(tie_word_embeddings=True))
    rotated = Rotated(base)
    assert base.config.tie_word_embeddings and not rotated.config.tie_word_embeddings
    assert set(rotated.names()) - set(base.names()) == {"lm_head.weight"}
    gain = base.tensor("model.norm.weight")
    table, head = (rotated.tensor(f"{part}.weight") for part in ("model.embed_tokens", "lm_head"))
    products = base.tensor("model.embed_tokens.weight") @ (base.tensor("model.embed_tokens.weight") * gain).T
    torch.testing.assert_close(table @ head.T, products, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_gains_are_one_and_an_outlier_channel_is_spread(name):
    base = InMemory(variant(name))
    rotated = Rotated(base)
    norms = [n for n in base.names() if "norm" in n and n.endswith("weight")]
    assert norms and all(torch.equal(rotated.tensor(n), torch.ones(96)) for n in norms)
    table = rotated._outside(f"{base.family.embedding}.weight", None, None)
    torch.testing.assert_close(table.norm(), base.tensor(f"{base.family.embedding}.weight").norm())
    spike = torch.zeros(1, 96, dtype=torch.float64)
    spike[0, 7] = 1.0
    assert rotated._residual.apply(spike).abs().max() < 5 / math.sqrt(96)


def test_only_values_turn_within_heads():
    base = InMemory(variant("phi3"))
    with_heads, without = Rotated(base), Rotated(base, heads=False)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    one, other = with_heads.tensor(name), without.tensor(name)
    queries_and_keys = 96 + 32
    assert torch.equal(one[:queries_and_keys], other[:queries_and_keys])
    ours, theirs = (t[queries_and_keys:].view(2, 16, 96) for t in (one, other))
    assert not torch.allclose(ours, theirs, atol=1e-2)
    # Within a head an orthogonal matrix acts on the rows, and the same one in both heads.
    turn = torch.linalg.lstsq(theirs[0].T, ours[0].T).solution
    torch.testing.assert_close(turn.T @ turn, torch.eye(16), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(theirs[1].T @ turn, ours[1].T, rtol=1e-3, atol=1e-3)


def test_the_seed_decides_and_says_so():
    base = InMemory(tiny_model())
    name = "model.layers.1.mlp.down_proj.weight"
    one, again, other = Rotated(base), Rotated(base), Rotated(base, 1)
    assert torch.equal(one.tensor(name), again.tensor(name))
    assert torch.equal(one.rows(name, 3, 9), one.tensor(name)[3:9])
    assert torch.equal(one.rows("lm_head.weight", 3, 9), one.tensor("lm_head.weight")[3:9])
    assert not torch.allclose(one.tensor(name), other.tensor(name), atol=1e-3)
    digests = {c.digest() for c in (base, one, again, other, Rotated(base, kind="orthogonal"))}
    assert len(digests) == 4
    assert one.companions() == base.companions() and one.name == base.name
