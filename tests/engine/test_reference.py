"""The reference runner against transformers, and its promise: a token's logits follow from its sequence alone."""

import pytest
import torch

from frugallm.engine.reference import ReferenceRunner, why_not
from frugallm.errors import ModelError
from tiny_decoders import SPECIAL, tiny

TEXT = torch.randint(2, 61, (37,), generator=torch.Generator().manual_seed(3))


def step(runner, parts, rows=None):
    """Run one step of ``(tokens, first position, table)`` and return logits of all tokens."""
    tokens = torch.cat([t for t, _, _ in parts]).int()
    positions = torch.cat([torch.arange(p, p + len(t)) for t, p, _ in parts]).int()
    starts = torch.tensor([0, *torch.tensor([len(t) for t, _, _ in parts]).cumsum(0)]).int()
    width = max(len(table) for _, _, table in parts)
    tables = torch.tensor([table + [-1] * (width - len(table)) for _, _, table in parts]).int()
    rows = torch.arange(len(tokens)) if rows is None else torch.tensor(rows, dtype=torch.long)
    return runner.step(tokens, positions, starts, tables, rows.int())


@pytest.mark.parametrize("kind", SPECIAL)
def test_logits_are_those_of_transformers(kind):
    model = tiny(kind)
    expected = model(TEXT[None], use_cache=False).logits[0]
    logits = step(ReferenceRunner(tiny(kind), 4), [(TEXT, 0, [2, 0, 3])])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral"])
def test_neither_neighbours_nor_chunks_nor_blocks_change_a_bit(kind):
    model = tiny(kind)
    alone = step(ReferenceRunner(model, 4), [(TEXT, 0, [0, 1, 2])])
    runner = ReferenceRunner(model, 9)
    other = TEXT.flip(0)
    first = step(runner, [(other[:7], 0, [4, 5]), (TEXT[:5], 0, [8, 1, 3])])
    second = step(runner, [(TEXT[5:20], 5, [8, 1, 3]), (other[7:8], 7, [4, 5])])
    third = step(runner, [(TEXT[20:], 20, [8, 1, 3])], rows=[0, 16])
    assert torch.equal(first[7:], alone[:5])
    assert torch.equal(second[:15], alone[5:20])
    assert torch.equal(third, alone[[20, 36]])


def test_a_copied_block_holds_the_same(small_llama):
    runner = ReferenceRunner(small_llama, 4)
    step(runner, [(TEXT[:16], 0, [0])])
    before = step(runner, [(TEXT[16:17], 16, [0, 1])])
    runner.copy_block(0, 3)
    runner._keys[:, 0] = 7.0
    assert torch.equal(step(runner, [(TEXT[16:17], 16, [3, 1])]), before)


def test_what_it_does_not_know_is_refused_with_the_reason():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "length of a text" in why_not(tiny("llama", rope_parameters=dynamic).config)
    with pytest.raises(ModelError, match="architecture 'gpt2'"):
        ReferenceRunner(tiny("gpt2", num_key_value_heads=None), 4)
