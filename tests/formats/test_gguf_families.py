"""Each family in GGUF: tensors and hyper-parameters are what llama.cpp wants, and what it cannot compute is refused."""

import json

import gguf
import numpy as np
import pytest
import torch
from tiny_llama import GGUFWriter

from frugallm.conformance import trial
from frugallm.errors import ExportError, ModelError
from frugallm.formats.export import export
from frugallm.formats.gguf_families import FAMILIES
from frugallm.models import dense_model, gguf_architectures, gguf_file, open_checkpoint
from frugallm.models.gguf_reader import GGUFData
from frugallm.recipe import Recipe
from frugallm.report_files import manifest_of
from gguf_models import Heard, facts_of, other_family, written
from small_job import write_text

IDS = torch.tensor([[3, 50, 7, 99, 12, 200, 4, 4, 31]])
BLOCKS = "model.layers.1"


# -- experts -----------------------------------------------------------------------------------------------------------

TWO = {"num_experts_per_tok": 2}
#: Name of a case to model type, configuration, and what llama.cpp calls the architecture.
MIXTURES = {
    "mixtral": ("mixtral", TWO | {"num_local_experts": 11, "head_dim": 24}, "llama"),
    "qwen3_moe": (
        "qwen3_moe",
        TWO | {"num_experts": 5, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 32},
        "qwen3moe",
    ),
    "olmoe": ("olmoe", TWO | {"num_experts": 4, "num_key_value_heads": 4}, "olmoe"),
    "olmoe, tied": (
        "olmoe",
        TWO | {"num_experts": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "olmoe",
    ),
}


@pytest.fixture(params=MIXTURES, scope="module")
def mixture(request, tmp_path_factory):
    kind, changes, architecture = MIXTURES[request.param]
    folder, model = other_family(tmp_path_factory.mktemp("mixture"), kind, **changes)
    return folder, model, architecture


def test_experts_are_stacked_and_come_back(mixture, tmp_path):
    folder, model, architecture = mixture
    path = export(folder, "gguf:F32", tmp_path / "out.gguf")
    values = written(path)[0]
    state, config = model.state_dict(), model.config
    fused = state[f"{BLOCKS}.mlp.experts.gate_up_proj"].numpy()
    count, inner = fused.shape[0], fused.shape[1] // 2
    assert np.array_equal(values["blk.1.ffn_gate_exps.weight"], fused[:, :inner])
    assert np.array_equal(values["blk.1.ffn_up_exps.weight"], fused[:, inner:])
    down = state[f"{BLOCKS}.mlp.experts.down_proj"].numpy()
    assert np.array_equal(values["blk.1.ffn_down_exps.weight"], down)
    assert np.array_equal(values["blk.1.ffn_gate_inp.weight"], state[f"{BLOCKS}.mlp.gate.weight"].numpy())
    facts = facts_of(path)
    assert facts["general.architecture"] == architecture
    assert facts[f"{architecture}.expert_count"] == count
    assert facts[f"{architecture}.expert_used_count"] == 2
    assert facts[f"{architecture}.feed_forward_length"] == config.intermediate_size
    if architecture == "qwen3moe":
        assert facts["qwen3moe.expert_feed_forward_length"] == inner
    back = open_checkpoint(path)
    assert back.config.model_type == config.model_type
    assert torch.allclose(dense_model(back)(IDS).logits, model(IDS).logits, atol=1e-5)


def test_a_head_of_its_own_is_written_where_llama_cpp_wants_one(tmp_path):
    kind, changes, _ = MIXTURES["olmoe, tied"]
    values, types = written(export(other_family(tmp_path, kind, **changes)[0], "gguf:Q4_0"))
    assert np.array_equal(values["output.weight"], values["token_embd.weight"])
    assert types["output.weight"] == types["token_embd.weight"] == "Q8_0"


def test_experts_are_rounded_one_by_one_and_routers_stay(mixture, tmp_path):
    folder, model, _ = mixture
    heard = Heard()
    path = export(folder, "gguf:Q4_0", tmp_path / "out.gguf", heard)
    values, types = written(path)
    assert {types[f"blk.0.ffn_{x}_exps.weight"] for x in ("gate", "up", "down")} == {"Q4_0"}
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    gap = values["blk.1.ffn_down_exps.weight"] - model.state_dict()[f"{BLOCKS}.mlp.experts.down_proj"].numpy()
    assert 0 < np.abs(gap).max() < 0.2
    again = tmp_path / "again.gguf"
    export(path, "gguf:Q4_0", again, heard)
    assert heard.said[-1].split(";")[0].endswith("lossless, 0 rounded")
    ours, theirs = ({t.name: t.data for t in gguf.GGUFReader(p).tensors} for p in (again, path))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_codes_of_compressed_experts_are_carried_over(tmp_path):
    kind, changes, _ = MIXTURES["mixtral"]
    folder, _ = other_family(tmp_path, kind, **changes)
    checkpoint = open_checkpoint(folder)
    tokens = torch.randint(200, (4, 32), generator=torch.Generator().manual_seed(0))
    steps = Recipe.parse(["rtn:bits=4,group_size=32", "embedding:bits=8"]).steps
    job = trial.job_for(checkpoint, steps, tokens, stored=torch.float32)
    run = trial.carry_out(job, tmp_path / "run")
    (run.folder / "manifest.json").write_text(json.dumps(manifest_of(job, run.folder)))
    run.place.finish()
    heard = Heard()
    path = export(tmp_path / "run", "gguf:Q4_0", progress=heard)
    assert ", 0 rounded" in heard.said[-1]
    kept, back = open_checkpoint(tmp_path / "run", compressed=True), open_checkpoint(path)
    name = f"{BLOCKS}.mlp.experts.10.up_proj.weight"
    assert torch.equal(back.tensor(name), kept.tensor(name).float())


# -- what else is called otherwise -------------------------------------------------------------------------------------


def hyper_parameters(path):
    """Return the hyper-parameters of a file without the architecture in front of their names."""
    facts = facts_of(path)
    front = facts["general.architecture"] + "."
    return {key.removeprefix(front): value for key, value in facts.items() if key.startswith(front)}


GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}


@pytest.mark.parametrize("tied", [True, False])
def test_gains_of_gemma_are_stored_plus_one(tied, tmp_path):
    folder, model = other_family(tmp_path, "gemma3_text", **GEMMA, tie_word_embeddings=tied)
    path = export(folder, "gguf:F32")
    values, state = written(path)[0], model.state_dict()
    names = {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    }
    for stored, name in names.items():
        gain = state[f"{BLOCKS}.{name}.weight"].numpy() + np.float32(1)
        assert np.array_equal(values[f"blk.1.{stored}.weight"], gain), name
    assert np.array_equal(values["output_norm.weight"], state["model.norm.weight"].numpy() + np.float32(1))
    query = state[f"{BLOCKS}.self_attn.q_proj.weight"].numpy()
    assert np.array_equal(values["blk.1.attn_q.weight"], query)
    assert ("output.weight" in values) is not tied
    found = hyper_parameters(path)
    assert found["attention.key_length"] == found["attention.value_length"] == 32
    assert found["rope.freq_base"] == 1e6 and found["rope.freq_base_swa"] == 1e4


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("layers", "window", "pattern"),
    [
        ([SLIDING] * 5 + [FULL, SLIDING], 16, None),
        ([SLIDING, FULL], 16, [True, False]),
        ([FULL, FULL], None, None),
    ],
)
def test_windows_of_gemma_are_told_block_by_block(layers, window, pattern, tmp_path):
    changes = GEMMA | {"layer_types": layers, "num_hidden_layers": len(layers)}
    folder, _ = other_family(tmp_path, "gemma3_text", **changes, final_logit_softcapping=30.0)
    found = hyper_parameters(export(folder, "gguf:F32"))
    assert found.get("attention.sliding_window") == window
    assert found.get("attention.sliding_window_pattern") == pattern
    assert found["final_logit_softcapping"] == 30


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [[SLIDING] * 5 + [FULL, SLIDING], [FULL, SLIDING], [FULL, FULL]])
def test_gemma_comes_back_from_its_file(layers, tied, tmp_path):
    changes = GEMMA | {"layer_types": layers, "num_hidden_layers": len(layers), "tie_word_embeddings": tied}
    folder, model = other_family(tmp_path, "gemma3_text", **changes)
    for name, gain in model.state_dict().items():
        if name.endswith("norm.weight"):
            gain.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    path = export(folder, "gguf:F32")
    back = open_checkpoint(path)
    assert back.config.model_type == "gemma3_text" and back.config.layer_types == layers
    ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))  # beyond the window
    assert torch.allclose(dense_model(back)(ids).logits, model(ids).logits, atol=1e-5)
    again = tmp_path / "again.gguf"
    export(path, "gguf:F32", again)
    assert all(np.array_equal(value, written(path)[0][name]) for name, value in written(again)[0].items())


def test_a_pattern_of_windows_that_fits_no_blocks_is_refused(tmp_path):
    layers = [FULL, SLIDING]
    changes = GEMMA | {"layer_types": layers, "num_hidden_layers": 2}
    path = export(other_family(tmp_path, "gemma3_text", **changes)[0], "gguf:F32")
    reader = GGUFData(path)
    reader.metadata["gemma3.attention.sliding_window_pattern"] = [True]
    with pytest.raises(ModelError, match="expected a value for each of 2 blocks"):
        gguf_file._config(reader, gguf_architectures.ARCHITECTURES["gemma3"])


def test_phi_keeps_fused_linears_and_turns_a_part_of_a_head(tmp_path):
    positions = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    folder, model = other_family(tmp_path, "phi3", rope_parameters=positions, sliding_window=16)
    heard = Heard()
    path = export(folder, "gguf:F32", progress=heard)
    values, state = written(path)[0], model.state_dict()
    for stored, name in {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}.items():
        assert np.array_equal(values[f"blk.1.{stored}.weight"], state[f"{BLOCKS}.{name}.weight"].numpy())
    found = hyper_parameters(path)
    assert found["rope.dimension_count"] == 8 and found["attention.key_length"] == 16
    assert found["attention.sliding_window"] == 16 and "looks back 16 tokens" in heard.said[0]


def test_a_name_with_phi3_in_it_is_spelt_otherwise_where_llama_cpp_would_miss_tokens(tmp_path):
    folder, _ = other_family(tmp_path, "phi3")
    assert folder.name == "phi3"
    assert facts_of(export(folder, "gguf:F32"))["general.name"] == "Phi 3"


@pytest.mark.parametrize("inner", [None, 96])
def test_conv1d_is_turned_and_positions_stay_f32(inner, tmp_path):
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": inner}
    folder, model = other_family(tmp_path, "gpt2", **shape)
    path = export(folder, "gguf:Q8_0")
    (values, types), state = written(path), model.state_dict()
    assert types["position_embd.weight"] == "F32" and types["blk.1.attn_qkv.weight"] == "Q8_0"
    assert np.array_equal(values["position_embd.weight"], state["transformer.wpe.weight"].numpy())
    for stored, name in {
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_up": "mlp.c_fc",
    }.items():
        turned = state[f"transformer.h.1.{name}.weight"].T.numpy()
        assert np.abs(values[f"blk.1.{stored}.weight"] - turned).max() < 0.01, name
        bias = state[f"transformer.h.1.{name}.bias"].numpy()
        assert np.array_equal(values[f"blk.1.{stored}.bias"], bias)
    found = hyper_parameters(path)
    assert found["feed_forward_length"] == (inner or 256)
    assert not [key for key in found if key.startswith("rope")]
    assert found["attention.layer_norm_epsilon"] == np.float32(1e-5)


@pytest.mark.parametrize("parallel", [True, False])
def test_interleaved_heads_of_neox_are_taken_apart(parallel, tmp_path):
    folder, model = other_family(tmp_path, "gpt_neox", use_parallel_residual=parallel, hidden_act="gelu")
    heard = Heard()
    path = export(folder, "gguf:F32", progress=heard)
    values, state = written(path)[0], model.state_dict()
    for kind in ("weight", "bias"):
        fused = state[f"gpt_neox.layers.1.attention.query_key_value.{kind}"].numpy()
        by_head = np.split(fused, 4)  # each [q k v] of 16 rows
        apart = [np.concatenate([np.split(head, 3)[part] for head in by_head]) for part in range(3)]
        assert np.array_equal(values[f"blk.1.attn_qkv.{kind}"], np.concatenate(apart))
    found = hyper_parameters(path)
    assert found["use_parallel_residual"] is parallel and found["rope.dimension_count"] == 4
    assert "llama.cpp computes its tanh form" in heard.said[0]


EVERY = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    **{kind: changes for kind, changes, _ in MIXTURES.values()},
    "gemma3_text": GEMMA,
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_written_with_importance(kind, tmp_path):
    """All linears of all families have an importance, and what comes out is near what went in."""
    folder = other_family(tmp_path, kind, **EVERY[kind])[0]
    text = write_text(tmp_path / "text.txt", words=200)
    path = export(folder, "gguf:Q4_0", imatrix=True, text=text, samples=2, seq_len=32)
    (values, types), checkpoint = written(path), open_checkpoint(folder)
    weights = {name: values[name] for name, stored in types.items() if stored == "Q4_0"}
    assert len(weights) == len({x.split(".experts.")[0] + x.split(".")[-1] for x in checkpoint.linears()})
    plain = written(export(folder, "gguf:Q4_0", tmp_path / "plain.gguf"))[0]
    assert all(np.isfinite(value).all() for value in weights.values())
    assert all(not np.array_equal(value, plain[name]) for name, value in weights.items())


# -- scaled rotary positions -------------------------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PUBLISHED = LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("kind", "positions", "read_as"),
    [
        ("llama", LINEAR, "linear"),
        ("qwen2", LINEAR, "linear"),
        ("llama", YARN, "yarn"),
        ("qwen3", YARN | {"attention_factor": 1.3}, "yarn"),
        ("llama", LLAMA3, "longrope"),
        ("mistral", PUBLISHED | {"factor": 32.0}, "llama3"),
    ],
)
def test_scaled_positions_come_back(kind, positions, read_as, tmp_path):
    folder, model = other_family(tmp_path, kind, rope_parameters=positions, head_dim=16)
    back = open_checkpoint(export(folder, "gguf:F32"))
    assert back.config.rope_parameters["rope_type"] == read_as
    if read_as == "llama3":
        assert back.config.rope_parameters == model.config.rope_parameters
    ids = torch.arange(128)[None] % 260
    assert torch.allclose(dense_model(back)(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize("original", [16, 100, 4096])
@pytest.mark.parametrize("attention", [None, 0.7])
def test_yarn_is_what_llama_cpp_makes_of_the_numbers(original, attention, tmp_path):
    positions = YARN | {"original_max_position_embeddings": original, "attention_factor": attention}
    folder, model = other_family(tmp_path, "llama", rope_parameters=positions, hidden_size=256)
    found = hyper_parameters(export(folder, "gguf:F32"))
    theta, factor = found["rope.freq_base"], found["rope.scaling.factor"]
    length, width = found["rope.scaling.original_context_length"], found["rope.dimension_count"]

    def place(turns):  # of the frequency that turns so often in the original context
        return width * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(theta))

    first, last = max(0, np.floor(place(32))), min(width - 1, np.ceil(place(1)))
    pairs = np.arange(width // 2)
    kept = 1 - np.clip((pairs - first) / max(0.001, last - first), 0, 1)
    frequency = theta ** (-2 * pairs / width) * (kept + (1 - kept) / factor)
    rotary = model.model.rotary_emb
    assert np.allclose(rotary.inv_freq.numpy(), frequency, rtol=1e-5)
    scale = (0.1 * np.log(factor) + 1) * found.get("rope.scaling.attn_factor", 1)
    assert np.isclose(rotary.attention_scaling, scale)


def test_divisors_of_llama3_are_those_of_the_model(tmp_path):
    folder, model = other_family(tmp_path, "llama", rope_parameters=LLAMA3)
    values, types = written(export(folder, "gguf:Q4_0"))
    plain = 1e4 ** (-np.arange(8) / 8)
    assert types["rope_freqs.weight"] == "F32"
    scaled = model.model.rotary_emb.inv_freq.numpy()
    assert np.allclose(plain / values["rope_freqs.weight"], scaled, rtol=1e-5)
    assert values["rope_freqs.weight"][0] == 1 and np.isclose(values["rope_freqs.weight"][-1], 8)


def test_factors_of_longrope_are_written_and_what_chooses_them_is_told(tmp_path):
    long, short = [1 + 0.5 * i for i in range(8)], [1 + 0.1 * i for i in range(8)]
    positions = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": long, "short_factor": short}
    changes = {"rope_parameters": positions, "original_max_position_embeddings": 32}
    folder, model = other_family(tmp_path, "phi3", **changes)
    heard = Heard()
    path = export(folder, "gguf:F32", progress=heard)
    values, found = written(path)[0], hyper_parameters(path)
    assert np.allclose(values["rope_factors_long.weight"], long)
    assert np.allclose(values["rope_factors_short.weight"], short)
    assert found["rope.scaling.type"] == "longrope"
    assert found["rope.scaling.original_context_length"] == 32
    assert np.isclose(found["rope.scaling.attn_factor"], model.model.rotary_emb.attention_scaling)
    assert "set to more than 32 tokens" in heard.said[0]


def test_gemma_scales_the_positions_of_whole_texts_alone(tmp_path):
    positions = {FULL: LINEAR, SLIDING: {"rope_type": "default", "rope_theta": 5e3}}
    folder, _ = other_family(tmp_path, "gemma3_text", **GEMMA, rope_parameters=positions)
    found = hyper_parameters(export(folder, "gguf:F32"))
    assert found["rope.freq_base"] == 1e4 and found["rope.freq_base_swa"] == 5e3
    assert found["rope.scaling.type"] == "linear" and found["rope.scaling.factor"] == 2.5


@pytest.mark.parametrize("divisors", [[1.0] * 7, [0.0] * 8, [float("nan")] * 8])
def test_divisors_that_divide_nothing_are_refused(divisors, tmp_path):
    def add(tensors):
        tensors["rope_freqs.weight"] = np.array(divisors, np.float32)

    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        open_checkpoint(GGUFWriter(tmp_path)(edit=add))


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("qwen3_moe", {"num_experts": 4}, "norm_topk_prob is False, llama.cpp computes True in 'qwen3moe'"),
        (
            "qwen3_moe",
            {"num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [1]},
            "block 1 has no experts, which llama.cpp does not compute in 'qwen3moe'",
        ),
        ("olmoe", {"num_experts": 4, "num_key_value_heads": 4, "clip_qkv": 0.5}, "clip_qkv is 0.5"),
        ("olmoe", {"num_experts": 4}, "2 key heads serve 4 heads"),
        ("qwen2", {"head_dim": 24}, "4 heads of 24 are not as wide as the model"),
        ("gemma3_text", GEMMA | {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64 and not 32"),
        ("gemma3_text", GEMMA | {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping is 5.0"),
        ("gemma3_text", GEMMA | {"use_bidirectional_attention": True}, "computes False in 'gemma3'"),
        ("gpt2", {"n_head": 4, "scale_attn_by_inverse_layer_idx": True}, "by_inverse_layer_idx is True"),
        ("gpt2", {"n_head": 4, "activation_function": "relu"}, "relu, llama.cpp computes gelu_new"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias is False"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "scaled by 'dynamic'"),
        (
            "qwen3",
            {"rope_parameters": LLAMA3},
            "scaled by 'llama3', which llama.cpp does not compute in 'qwen3'",
        ),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "beta_fast of the rotary scaling is 16"),
    ],
)
def test_variants_that_llama_cpp_does_not_compute_are_refused(kind, changes, said, tmp_path):
    folder, _ = other_family(tmp_path, kind, **changes)
    with pytest.raises(ExportError, match=said) as caught:
        export(folder, "gguf:F32")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(f"{kind}-*"))
