"""Engines on tiny models that look for lost blocks after every step."""

import zlib

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from frugallm.engine.core import Engine, Limits

LETTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJK0123456789{}[]":.,!? \n'
VOCABULARY = len(LETTERS) + 2
END = 1
TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}\n{% endfor %}"


def letters_tokenizer():
    """One token for each letter, with begin 0 and end 1."""
    bytes_apart = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = bytes_apart.pre_tokenize_str(LETTERS)[0][0]
    words = {"<s>": 0, "</s>": END} | {letter: i for i, letter in enumerate(letters, 2)}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer, backend.decoder = bytes_apart, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


class Checked(Engine):
    """Checks all blocks after every step, and counts what it computes."""

    steps = computed = 0

    def step(self):
        super().step()
        self.steps += 1
        self.check()

    def _compute(self, step):
        self.computed += sum(count for _, count in step.parts)
        return super()._compute(step)

    def finish(self, *requests):
        while not all(request.finished for request in requests):
            self.step()


class TokenRunner:
    """Keeps tokens where a model keeps keys, and makes logits of all the tokens that a table leads to.

    One token in the wrong place, lost or read from another sequence gives other logits.
    """

    block_size = 16

    def __init__(self, blocks):
        self.cache = np.full((blocks, self.block_size), -1, np.int32)

    def step(self, tokens, positions, starts, tables, logits_rows):
        tokens, positions, starts, tables, wanted = (
            np.asarray(part) for part in (tokens, positions, starts, tables, logits_rows)
        )
        owner = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        blocks = tables[owner, positions // self.block_size]
        assert (blocks >= 0).all()
        self.cache[blocks, positions % self.block_size] = tokens
        return torch.from_numpy(np.array([self._logits(tables[owner[r]], positions[r]) for r in wanted]))

    def _logits(self, table, position):
        held = self.cache[table[table >= 0]].ravel()[: position + 1]
        assert len(held) == position + 1 and (held >= 0).all()
        return np.random.default_rng(zlib.crc32(held.tobytes())).normal(0, 2, VOCABULARY).astype(np.float32)

    def copy_block(self, source, target):
        self.cache[target] = self.cache[source]


def small_engine(tokenizer, runner=None, blocks=40, context=256, step=512, sequences=16):
    """Make an engine on a runner, or on one that keeps tokens."""
    limits = Limits(context, VOCABULARY, step, sequences)
    return Checked(runner or TokenRunner(blocks), blocks, tokenizer, limits, frozenset({END}))
