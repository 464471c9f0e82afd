"""Tiny random models: what is tested here is measuring, not quality."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_llama(seed=0, **changes):
    settings = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval().requires_grad_(False)


def digit_tokenizer(bos=False):
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<s>", "?", *"0123456789 "])}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="?")


@pytest.fixture
def make_model():
    return tiny_llama


@pytest.fixture
def make_tokenizer():
    return digit_tokenizer


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def other():
    """The same model, slightly damaged."""
    damaged = tiny_llama()
    generator = torch.Generator().manual_seed(1)
    for parameter in damaged.parameters():
        parameter += 0.03 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return damaged


@pytest.fixture(scope="session")
def windows():
    """Text that the model itself has written, so that it is better than guessing."""
    writer = tiny_llama()
    torch.manual_seed(2)
    start = torch.arange(5)[:, None]
    return writer.generate(start, do_sample=True, min_new_tokens=63, max_new_tokens=63, pad_token_id=0)


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Handing such small products to more threads takes longer than doing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
