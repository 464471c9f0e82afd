"""Engines on tiny models that look for lost blocks after every step."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from frugallm.engine.core import Engine, Limits
from frugallm.engine.reference import ReferenceRunner

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?\n"
VOCABULARY = len(LETTERS) + 2
END = 1
TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}\n{% endfor %}"


def letters_tokenizer():
    """One token for each letter, with begin 0 and end 1."""
    words = {"<s>": 0, "</s>": END} | {letter: i for i, letter in enumerate(LETTERS, 2)}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
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


def small_engine(model, tokenizer, blocks=40, context=256, step=512, sequences=16, runner=None):
    runner = runner or ReferenceRunner(model, blocks)
    return Checked(runner, blocks, tokenizer, Limits(context, VOCABULARY, step, sequences), frozenset({END}))
