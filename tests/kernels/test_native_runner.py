"""A native step computes what the plain model computes, and a token's result depends on its own sequence alone."""

import shutil

import gguf
import numpy as np
import pytest
import torch
from tiny_llama import GGUFWriter, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from finished_run import finished
from frugallm.errors import ModelError, ParameterError
from frugallm.formats.decoded import Decoded
from frugallm.formats.export import export
from frugallm.kernels import library
from frugallm.kernels.decoder import read_decoder
from frugallm.kernels.native_runner import NativeRunner
from frugallm.kernels.packing import in_turns
from frugallm.models.gguf_file import GGUFFile
from frugallm.models.in_memory import InMemory
from frugallm.models.open import dense_model
from gguf_models import other_family

PATHS = library.usable_paths()
pytestmark = pytest.mark.skipif(not PATHS, reason="the native kernels are not built")
SHAPE = {
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
KINDS = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 9, "head_dim": 20},
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": {"head_dim": 32, "num_key_value_heads": 1},
    "gemma3_text": {
        "head_dim": 24,
        "num_key_value_heads": 1,
        "sliding_window": 9,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 40,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        },
    },
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LATER = {"sliding_attention": DYNAMIC}
LENGTH = 37


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.delenv("FRUGAL_KERNELS", raising=False)


def tiny(kind, **changes):
    config = CONFIG_MAPPING[kind](**(SHAPE | KINDS.get(kind, {}) | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data.copy_(noise * 0.15 if parameter.ndim > 1 else parameter + noise * 0.1)
    model.set_attn_implementation("eager")
    return model.requires_grad_(False).eval()


def texts(count, length=LENGTH):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 70, (count, length), generator=generator, dtype=torch.int32)


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32)


def one_text(runner, tokens, chunk, table, rows=None):
    """Return the logits of all tokens of one text, computed in chunks."""
    out = []
    for start in range(0, len(tokens), chunk):
        some = tokens[start : start + chunk]
        positions = torch.arange(start, start + len(some), dtype=torch.int32)
        wanted = torch.arange(len(some), dtype=torch.int32)
        out.append(runner.step(some, positions, numbers(0, len(some)), table[None], wanted))
    return torch.cat(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_computes_the_plain_model(kind):
    model = tiny(kind)
    tokens = texts(1)[0]
    expected = model(tokens[None].long()).logits[0]
    runner = NativeRunner(read_decoder(InMemory(model)), blocks=8, threads=1)
    found = one_text(runner, tokens, LENGTH, numbers(5, 2, 7))
    error = ((found - expected) ** 2).sum() / (expected**2).sum()
    assert error < 1e-4  # keys, values and weights of attention are bf16
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("path", PATHS)
def test_neither_chunks_nor_neighbours_nor_threads_nor_blocks_change_a_bit(path, kind):
    decoder = read_decoder(InMemory(tiny(kind)))
    some = texts(3)
    plain = NativeRunner(decoder, blocks=12, threads=1, path="generic")
    expected = [one_text(plain, text, LENGTH, numbers(0, 1, 2)) for text in some]
    for threads, chunk in ((1, 1), (2, 7), (3, 16)):
        runner = NativeRunner(decoder, blocks=12, threads=threads, path=path)
        for text, logits in zip(some, expected):
            assert torch.equal(one_text(runner, text, chunk, numbers(9, 3, 11)), logits)
    runner = NativeRunner(decoder, blocks=12, threads=2, path=path)
    tables = numbers(0, 1, 2, 3, 4, 5, 6, 7, 8).view(3, 3)
    places = torch.arange(LENGTH, dtype=torch.int32)
    starts = numbers(0, LENGTH, 2 * LENGTH, 3 * LENGTH)
    together = runner.step(some.flatten(), places.repeat(3), starts, tables, torch.arange(3 * LENGTH))
    assert torch.equal(together, torch.cat(expected))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "wanted", [[36], [73, 3, 3, 36], list(range(73, 50, -1))], ids=["one", "some", "many"]
)
def test_the_last_layer_computes_what_is_wanted_in_any_order(kind, threads, wanted):
    runner = NativeRunner(read_decoder(InMemory(tiny(kind))), blocks=12, threads=threads)
    some, places = texts(2).flatten(), torch.arange(LENGTH, dtype=torch.int32).repeat(2)
    tables = numbers(0, 1, 2, 3, 4, 5).view(2, 3)
    step = some, places, numbers(0, LENGTH, 2 * LENGTH), tables
    everything = runner.step(*step, torch.arange(2 * LENGTH, dtype=torch.int32))
    assert torch.equal(runner.step(*step, numbers(*wanted)), everything[wanted])


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("chunk", [5, 20])
def test_a_part_of_a_prompt_of_which_nothing_is_wanted_fills_the_cache(kind, chunk):
    runner = NativeRunner(read_decoder(InMemory(tiny(kind))), blocks=6, threads=2)
    [text], table, nothing = texts(1), numbers(2, 4, 1)[None], torch.empty(0, dtype=torch.int32)
    expected = one_text(runner, text, LENGTH, numbers(0, 3, 5))[-1]
    for start in range(0, LENGTH - 1, chunk):
        some = text[start : min(start + chunk, LENGTH - 1)]
        places = torch.arange(start, start + len(some), dtype=torch.int32)
        assert runner.step(some, places, numbers(0, len(some)), table, nothing).shape == (0, 70)
    last = text[-1:], numbers(LENGTH - 1), numbers(0, 1), table, numbers(0)
    assert torch.equal(runner.step(*last)[0], expected)


def test_a_long_text_passes_chunks_of_the_cache():
    model = tiny("llama")
    tokens = texts(1, 600)[0]
    expected = model(tokens[None].long()).logits[0]
    runner = NativeRunner(read_decoder(InMemory(model)), blocks=40, threads=1)
    table = torch.arange(40, dtype=torch.int32).flip(0)
    found = one_text(runner, tokens, 250, table)
    assert ((found - expected) ** 2).sum() / (expected**2).sum() < 1e-4
    assert torch.equal(one_text(runner, tokens, 97, table), found)


def test_threads_that_share_a_long_text_by_chunks_change_no_bit():
    tokens = texts(1, 530)[0]
    decoder = read_decoder(InMemory(tiny("mistral", sliding_window=270)))
    one, three = (NativeRunner(decoder, blocks=40, threads=threads) for threads in (1, 3))
    table = torch.arange(40, dtype=torch.int32)
    expected = one_text(one, tokens, 530, table)
    assert torch.equal(one_text(three, tokens[:520], 260, table), expected[:520])
    for place in range(520, 530):  # one token has fewer heads than there are threads to feed
        last = numbers(int(tokens[place])), numbers(place), numbers(0, 1)
        assert torch.equal(three.step(*last, table[None], numbers(0))[0], expected[place])


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("llama", ["rtn:bits=4,group_size=32", "embedding"]),
        ("llama", ["rtn:bits=8,group_size=-1", "inputs:bits=8"]),
        ("gemma3_text", ["rtn:bits=4,group_size=32", "embedding"]),
    ],
)
def test_a_compressed_folder_is_computed_by_its_codes(tmp_path, kind, steps):
    folder, values, stored = finished(tmp_path, tiny(kind, intermediate_size=96), steps)
    decoder = read_decoder(Decoded(folder))
    layer = decoder.layers[0]
    assert layer.down.kind == ("int4" if "4" in steps[0] else "int8")
    assert torch.equal(layer.down.dequantize(), values["model.layers.0.mlp.down_proj.weight"].float())
    tokens = texts(1)[0]
    expected = stored(tokens[None].long()).logits[0]
    found = one_text(NativeRunner(decoder, blocks=3, threads=1), tokens, LENGTH, numbers(0, 1, 2))
    assert ((found - expected) ** 2).sum() / (expected**2).sum() < 5e-3  # inputs are rounded to int8 as well


K_QUANTS = {
    "embd.weight": "Q6_K",
    "attn_v.weight": "Q6_K",
    "ffn_gate.weight": "Q3_K",
    "ffn_up.weight": "IQ4_NL",
    "ffn_down.weight": "Q2_K",
    **dict.fromkeys(("attn_q.weight", "attn_k.weight", "attn_output.weight"), "Q4_K"),
}


@pytest.fixture(scope="module")
def k_quants(tmp_path_factory):
    """A GGUF file in which weights that share an input have different types."""
    model = tiny_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    return GGUFWriter(tmp_path_factory.mktemp("gguf"))(model=model, kinds=K_QUANTS)


def test_a_gguf_file_is_computed_by_its_codes(k_quants):
    checkpoint = GGUFFile(k_quants)
    decoder, state = read_decoder(checkpoint), checkpoint.block_state(0)
    layer = decoder.layers[0]
    parts = {
        "qkv": ("int8", [f"self_attn.{part}_proj" for part in "qkv"]),
        "output": ("int4", ["self_attn.o_proj"]),
        "gate_up": ("int8", ["mlp.gate_proj", "mlp.up_proj"]),
        "down": ("int4", ["mlp.down_proj"]),
    }
    for name, (kind, paths) in parts.items():
        weight, values = getattr(layer, name), torch.cat([state[f"{path}.weight"] for path in paths])
        assert weight.kind == kind
        assert torch.equal(weight.dequantize(), in_turns(values) if name == "gate_up" else values)
    assert decoder.head.kind == "int8"
    assert torch.equal(decoder.head.dequantize(), checkpoint.tensor("model.embed_tokens.weight"))
    tokens = texts(1)[0]
    expected = dense_model(checkpoint)(tokens[None].long()).logits[0]
    found = one_text(NativeRunner(decoder, blocks=3, threads=1), tokens, LENGTH, numbers(0, 1, 2))
    assert ((found - expected) ** 2).sum() / (expected**2).sum() < 5e-3


def test_a_gguf_file_of_gemma_is_computed_by_its_codes(tmp_path):
    changes = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9}
    path = export(other_family(tmp_path, "gemma3_text", **changes)[0], "gguf:Q4_0")
    checkpoint = GGUFFile(path)
    decoder = read_decoder(checkpoint)
    assert decoder.layers[0].down.kind == "int4"
    tokens = texts(1)[0]
    expected = dense_model(checkpoint)(tokens[None].long()).logits[0]
    found = one_text(NativeRunner(decoder, blocks=3, threads=1), tokens, LENGTH, numbers(0, 1, 2))
    assert ((found - expected) ** 2).sum() / (expected**2).sum() < 5e-3


def test_scales_that_are_no_numbers_are_refused(k_quants, tmp_path):
    path = shutil.copy(k_quants, tmp_path)
    tensors = gguf.GGUFReader(path, "r+").tensors
    stored = next(t for t in tensors if t.name == "blk.0.attn_output.weight")
    stored.data[3, 0:2] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(ModelError, match=r"o_proj\.weight holds NaN"):
        read_decoder(GGUFFile(path))


def test_a_copied_block_holds_the_same():
    runner = NativeRunner(read_decoder(InMemory(tiny("llama"))), blocks=4, threads=1)
    tokens = texts(1)[0]
    expected = one_text(runner, tokens, LENGTH, numbers(0, 1, 2))
    runner.copy_block(0, 3)
    last = numbers(int(tokens[-1])), numbers(LENGTH - 1), numbers(0, 1)
    again = runner.step(*last, numbers(3, 1, 2)[None], numbers(0))
    assert torch.equal(again[0], expected[-1])


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("vocabulary", {"tokens": numbers(70)}),
        ("position", {"positions": numbers(640)}),
        ("block", {"tables": numbers(4)[None]}),
        ("block", {"tables": numbers(-1)[None]}),
        ("row", {"logits_rows": numbers(1)}),
        ("starts", {"starts": numbers(0, 2)}),
    ],
)
def test_what_does_not_fit_is_refused(what, changes):
    runner = NativeRunner(read_decoder(InMemory(tiny("llama"))), blocks=4, threads=1)
    fine = {
        "tokens": numbers(3),
        "positions": numbers(0),
        "starts": numbers(0, 1),
        "tables": numbers(0)[None],
        "logits_rows": numbers(0),
    }
    assert runner.step(**fine).shape == (1, 70)
    with pytest.raises(ParameterError, match=what):
        runner.step(**(fine | changes))


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {"rope_parameters": DYNAMIC}, "dynamic"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"head_dim": 512}, "512"),
        ("gemma3_text", {"rope_parameters": KINDS["gemma3_text"]["rope_parameters"] | LATER}, "dynamic"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "gelu"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "capped"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "capped"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "looks ahead"),
    ],
)
def test_models_without_a_native_step_are_refused(kind, changes, reason):
    with pytest.raises(ModelError, match=reason):
        read_decoder(InMemory(tiny(kind, **changes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_is_scaled_as_the_plain_model_scales_it(dtype):
    model = tiny("gemma3_text", hidden_size=40).to(dtype)
    decoder = read_decoder(InMemory(model))
    assert decoder.embed_scale == float(torch.tensor(40**0.5).to(dtype))
    tokens = texts(1)[0].long()
    scaled = decoder.embedding.dequantize()[tokens] * decoder.embed_scale
    assert torch.equal(scaled.to(dtype), model.model.embed_tokens(tokens))
