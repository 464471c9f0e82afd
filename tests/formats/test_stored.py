"""A finished job read back: the values that the stored codes stand for, by tensor, by rows, as a model."""

import pytest
import torch

from frugallm.conformance.trial import KINDS, carry_out, job_for, random_model, windows
from frugallm.formats.rounded_inputs import round_activations
from frugallm.formats.stored import model_in_memory
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe

STEPS = ["smoothquant:token=[*.o_proj]", "gptq:bits=3,only=[*.mlp.*]", "embedding"]


@pytest.fixture(params=KINDS)
def done(request, tmp_path):
    checkpoint = InMemory(random_model(request.param))
    return carry_out(job_for(checkpoint, Recipe.parse(STEPS).steps, windows(request.param)), tmp_path / "run")


def test_every_tensor_comes_back_whole_and_by_rows(done):
    stored = done.place.stored(done.job)
    stored.validate()
    for name in stored.names():
        tensor = stored.tensor(name)
        assert tensor.shape == stored.shape(name) and tensor.isfinite().all()
        if tensor.ndim == 2:
            assert torch.equal(stored.rows(name, 1, 5), tensor[1:5])
            assert torch.equal(stored.rows(name, 0, 0), tensor[:0])


def test_an_input_scale_is_there_where_inputs_are_static(done):
    stored = done.place.stored(done.job)
    for path, plan in done.job.plan.linears.items():
        static = plan.scheme.activations is not None and not plan.scheme.activations.dynamic
        assert ("input_scale" in stored.input_parameters(path)) == static


def test_the_model_in_memory_rounds_its_inputs(done):
    stored = done.place.stored(done.job)
    model = model_in_memory(stored)
    path = "model.layers.0.self_attn.q_proj"
    seen = {}
    linear = model.get_submodule(path)
    linear.register_forward_pre_hook(
        lambda _, args: seen.setdefault("in", args[0])
    )  # after the one that rounds
    with torch.no_grad():
        model(done.job.windows)
    scheme = done.job.plan.linears[path].scheme.activations
    assert torch.equal(round_activations(seen["in"], scheme, stored.input_parameters(path)), seen["in"])
    assert len(seen["in"].unique()) <= 256


def test_a_stored_table_is_the_one_that_the_walk_embedded(done, tmp_path):
    stored = done.place.stored(done.job)
    solver = done.job.plan.tables["model.embed_tokens"]
    rows = done.job.checkpoint.tensor("model.embed_tokens.weight")
    assert torch.equal(
        stored.tensor("model.embed_tokens.weight"), solver.solver.solve(rows, solver.scheme).dequantize()
    )
