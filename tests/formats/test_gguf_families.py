"""Each family in GGUF: tensors and hyper-parameters are what llama.cpp wants, and what it cannot compute is refused."""

import json

import gguf
import numpy as np
import pytest
import torch

from frugallm.conformance import trial
from frugallm.errors import ExportError
from frugallm.formats.export import export
from frugallm.models import dense_model, open_checkpoint
from frugallm.recipe import Recipe
from frugallm.report_files import manifest_of
from gguf_models import Heard, facts_of, other_family, written

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
    ],
)
def test_variants_that_llama_cpp_does_not_compute_are_refused(kind, changes, said, tmp_path):
    folder, _ = other_family(tmp_path, kind, **changes)
    with pytest.raises(ExportError, match=said) as caught:
        export(folder, "gguf:F32")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(f"{kind}-*"))
