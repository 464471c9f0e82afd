"""Every family: read, run block by block, folded, compressed, written and read back, on a small random model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from frugallm.compress.plan import Plan
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.conformance.families import VARIANTS, tokens, variant
from frugallm.conformance.trial import carry_out, job_for
from frugallm.errors import ModelError
from frugallm.formats.decoded import load_decoded, only_read_here
from frugallm.formats.engines import loads_in_transformers
from frugallm.formats.folder import write_dense
from frugallm.formats.stored import model_in_memory
from frugallm.models.family import FAMILIES, family_of
from frugallm.models.in_memory import InMemory
from frugallm.models.offgrid import Offgrid
from frugallm.models.open import dense_model, load_plain
from frugallm.models.safetensors_folder import SafetensorsFolder
from frugallm.walk.walk import Walk

NOTHING = Plan(rewrites=(), linears={}, tables={}, left_alone=())


@pytest.fixture(params=VARIANTS, scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return variant(name)


@pytest.fixture(scope="module")
def checkpoint(model):
    checkpoint = InMemory(model)
    checkpoint.validate()
    return checkpoint


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def close(one, other, tolerance=1e-5):
    return (one - other).abs().max() <= tolerance * other.abs().max()


def linears_of(checkpoint):
    config, family = checkpoint.config, checkpoint.family
    return [
        f"{family.block(i)}.{linear}"
        for i in range(config.num_hidden_layers)
        for linear in family.linears(config, i)
    ]


def test_every_type_has_a_variant():
    assert {kind for kind, _ in VARIANTS.values()} == {t for family in FAMILIES for t in family.model_types}


def test_a_saved_folder_holds_the_same_tensors(model, checkpoint, tmp_path):
    model.save_pretrained(tmp_path)
    folder = SafetensorsFolder(tmp_path)
    folder.validate()
    assert folder.names() == checkpoint.names()
    for tensor in folder.names():
        assert folder.shape(tensor) == checkpoint.shape(tensor)
        assert torch.equal(folder.tensor(tensor), checkpoint.tensor(tensor))


def test_every_weight_of_a_block_is_a_linear_or_known_to_stay(checkpoint):
    linears = {f"{path}.weight" for path in linears_of(checkpoint)}
    blocks = f"{checkpoint.family.blocks}."
    matrices = {n for n in checkpoint.names() if n.startswith(blocks) and len(checkpoint.shape(n)) > 1}
    assert linears <= matrices
    assert all(n.endswith("mlp.gate.weight") for n in matrices - linears)  # routers


def test_a_filled_model_computes_the_same(model, checkpoint):
    assert torch.equal(logits(dense_model(checkpoint)), logits(model))


def test_blocks_run_piece_by_piece_give_the_plain_models_hidden_states(model, checkpoint, tmp_path):
    family = checkpoint.family
    seen = []
    for block in model.get_submodule(family.blocks):
        block.register_forward_hook(lambda _, args, out: seen.append(out))
    logits(model)
    walk = Walk(checkpoint, NOTHING, tokens(), tmp_path, fast=torch.float32, stored=torch.float32)
    walk.embed(lambda start, stop: checkpoint.rows(f"{family.embedding}.weight", start, stop))
    for index in range(len(walk)):
        walk.solve(index)
        assert close(walk.hidden.values, seen[index])


def test_folds_leave_the_logits(model, checkpoint, tmp_path):
    walk = Walk(checkpoint, NOTHING, None, tmp_path, fast=torch.float32)
    folded = {n: checkpoint.tensor(n) for n in checkpoint.names()}
    generator = torch.Generator().manual_seed(0)
    for index in range(len(walk)):
        block = walk.load(index)
        moved = 0
        for site in block.sites:
            if site.writer is None:
                continue
            before = block.weight(site.name).clone()
            width = before.shape[1]
            block.scale_site(site, torch.exp(torch.rand(width, generator=generator) * 2 - 1))
            assert not close(block.weight(site.name), before, 1e-2)
            moved += 1
        assert moved >= 2
        folded |= {block.full_name(n): tensor for n, tensor in block.state.items()}

    class Folded(InMemory):
        def _read(self, name, start, stop):
            return folded[name][start:stop]

    assert close(logits(dense_model(Folded(model))), logits(model), 1e-4)


def test_nothing_is_folded_where_an_activation_function_or_a_clip_is_in_the_way():
    for name, site in [
        ("gpt2", "mlp.c_proj"),
        ("gpt_neox", "mlp.dense_4h_to_h"),
        ("opt, gelu, untied", "fc2"),
        ("olmoe, clipped", "self_attn.o_proj"),
    ]:
        config = variant(name).config
        found = {s.name: s for s in family_of(config).sites(config, 0)}
        assert found[site].writer is None
    config = variant("opt").config
    assert {s.name: s for s in family_of(config).sites(config, 0)}["fc2"].writer == "fc1"


def test_the_offgrid_variant_computes_the_same(model, checkpoint):
    offgrid = Offgrid(checkpoint)
    assert close(logits(dense_model(offgrid)), logits(model), 1e-4)
    assert not torch.equal(
        offgrid.tensor(f"{linears_of(checkpoint)[0]}.weight"),
        checkpoint.tensor(f"{linears_of(checkpoint)[0]}.weight"),
    )


def test_a_dense_copy_loads_in_plain_transformers(model, checkpoint, tmp_path):
    write_dense(checkpoint, tmp_path / "out", torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))


def test_a_run_saves_what_it_chose_and_reads_it_back(model, checkpoint, tmp_path):
    run = carry_out(job_for(checkpoint, [GPTQ(bits=4, group_size=16)], tokens()), tmp_path / "out")
    assert list(run.job.plan.linears) == linears_of(checkpoint)
    kept = logits(model_in_memory(run.place.stored(run.job)))
    read = logits(load_decoded(run.folder, torch.float32))
    assert torch.equal(read, kept)
    assert not torch.equal(kept, logits(model))
    if loads_in_transformers(run.job.plan):
        assert close(logits(load_plain(run.folder, torch.float32)), kept)
    else:  # never random weights with a warning
        assert only_read_here(run.folder)
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(run.folder)


def test_another_architecture_is_named_with_those_that_are_known():
    with pytest.raises(ModelError, match="'bloom' is not supported") as caught:
        family_of(BloomConfig())
    assert "gpt_neox" in caught.value.hint and "add-a-family" in caught.value.hint


def test_variants_that_no_description_covers_are_refused():
    from transformers import OPTConfig

    with pytest.raises(ModelError, match="opt-350m"):
        family_of(OPTConfig(do_layer_norm_before=False))
