"""Rotation in recipes: the plan, the basis that inputs are rounded in, and what is stored of it."""

import json

import pytest
import torch

from frugallm.compress.plan import make_plan
from frugallm.compress.prepare import prepared
from frugallm.compress.quantize.hadamard import hadamard_rotation
from frugallm.compress.quantize.solvers import compensate
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import ModelError, RecipeError
from frugallm.formats.decoded import Decoded
from frugallm.formats.extras import InputRotation
from frugallm.formats.packed_folder import load_packed
from frugallm.formats.quantized_tensor import ActivationScheme
from frugallm.formats.rounded_inputs import round_activations
from frugallm.formats.stored import model_in_memory
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe

DOWN = "model.layers.0.mlp.down_proj"
W4A4 = ("rotate", "inputs:bits=4", "gptq:bits=4,group_size=16")


@pytest.fixture(scope="module")
def tied():
    return InMemory(random_model("tied"))


def plan(checkpoint, *steps):
    parsed = Recipe.parse(steps).steps
    return make_plan(parsed, prepared(parsed, checkpoint, 0))


def job(*steps):
    return job_for(InMemory(random_model("tied")), Recipe.parse(steps).steps, windows("tied"))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return carry_out(job(*W4A4), tmp_path_factory.mktemp("rotate") / "out")


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (["gptq", "rotate"], "rotate after gptq: it rewrites the whole model.*Put it first"),
        (["smoothquant", "rotate"], "rotate after smoothquant"),
        (["embedding", "rotate"], "rotate after embedding"),
        (["rotate", "rotate:heads=false"], "rotate stands twice"),
        (["rotate", "wanda", "inputs"], r"zeros of \S+down_proj are none.*online=never"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(tied, steps, says):
    with pytest.raises(RecipeError, match=says):
        plan(tied, *steps)


def test_a_model_that_cannot_be_rotated_is_refused_before_any_work():
    from frugallm.conformance.families import variant

    with pytest.raises(ModelError, match=r"cannot be rotated"):
        plan(InMemory(variant("gemma3")), "rotate", "rtn")


@pytest.mark.parametrize(
    ("steps", "turned"),
    [
        (["rotate", "gptq:bits=3"], set()),
        (["rotate", "inputs", "gptq:bits=3"], {"down_proj"}),
        (["rotate", "inputs:skip=[*.down_proj]", "gptq:bits=3"], set()),
        (["rotate:online=never", "inputs", "gptq:bits=3"], set()),
        (["rotate:online=always", "gptq:bits=3"], {"down_proj"}),
        (["rotate:online=always", "gptq:bits=3,skip=[*.down_proj]"], set()),
    ],
)
def test_inputs_are_rotated_where_they_are_rounded_or_as_asked(tied, steps, turned):
    linears = plan(tied, *steps).linears
    found = {name for name, one in linears.items() if one.rotation is not None}
    assert {name.rpartition(".")[2] for name in found} == turned
    for name, one in linears.items():
        scheme = one.scheme
        assert (scheme.weights.extras == ("rotation",)) == (name in found)
        if scheme.activations is not None:
            assert scheme.activations.rotation == (160 if name in found else None)


def test_rounding_inputs_in_another_basis_is_rounding_there():
    x = torch.randn(3, 5, 160, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 8, 160)
    r = hadamard_rotation(80).matrix(160).float()
    plain = ActivationScheme(bits=4)
    rotated = plain.model_copy(update={"rotation": 80})
    one, other = round_activations(x, rotated, {}) @ r, round_activations(x @ r, plain, {})
    assert torch.isclose(one, other, atol=1e-4).float().mean() > 0.998  # a tie may fall to either side
    assert round_activations(x.bfloat16(), rotated, {}).dtype is torch.bfloat16


def test_a_spike_spoils_rounded_inputs_unless_they_are_rotated():
    x = torch.randn(64, 160, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 100.0

    def error(scheme):
        return (round_activations(x, scheme, {}) - x)[:, torch.arange(160) != 3].norm()

    assert error(ActivationScheme(bits=4, rotation=160)) < 0.5 * error(ActivationScheme(bits=4))


def test_a_weight_is_turned_back_row_by_row():
    weight = torch.randn(7, 96)
    extra = InputRotation.of(96)
    back = InputRotation.from_tensors(extra.tensors())
    torch.testing.assert_close(back.apply(extra.rotation.apply(weight)), weight)
    torch.testing.assert_close(extra.rows(2, 4).apply(weight[2:4]), extra.apply(weight)[2:4])


def test_a_rotated_weight_is_solved_with_the_moment_of_rotated_inputs(tmp_path):
    """The walk hands the solver weight and statistics in the basis that inputs are rounded in."""
    from frugallm.compress.contract import BlockMethod
    from frugallm.compress.quantize.grids import fit
    from frugallm.compress.quantize.rotate import Rotate
    from frugallm.formats.quantized_tensor import WeightScheme

    seen = {}

    class Watching(BlockMethod):
        solves = "step"
        solve_needs = frozenset({"second_moment", "absmax"})

        def weights(self, widths):
            return WeightScheme(bits=4)

        def solve(self, weight, scheme, statistics):
            seen.setdefault(weight.shape, (weight, dict(statistics)))
            scale, zero = fit(weight, scheme)
            return compensate(weight, statistics["second_moment"], scale, zero, scheme)

    def moment(rotate):
        seen.clear()
        steps = [rotate, Watching(only=("*.layers.0.mlp.down_proj",))]
        carry_out(job_for(InMemory(random_model("tied")), steps, windows("tied")), tmp_path / rotate.online)
        return seen[96, 160]

    plain, statistics = moment(Rotate(online="never"))
    turned, inside = moment(Rotate(online="always"))
    r = hadamard_rotation(160).matrix(160).float()
    torch.testing.assert_close(turned, plain @ r, rtol=1e-4, atol=1e-5)
    h = statistics["second_moment"]
    torch.testing.assert_close(inside["second_moment"], r.T @ h @ r, rtol=1e-3, atol=1e-3 * float(h.max()))
    assert inside["absmax"].max() < statistics["absmax"].max()


def test_what_is_stored_reads_back_as_it_was_kept(done):
    config = json.loads((done.folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    kept = model_in_memory(done.place.stored(done.job))
    read = load_packed(Decoded(done.folder), torch.float32)
    with torch.no_grad():
        one, other = (model(windows("tied")).logits for model in (kept, read))
    assert torch.equal(one, other)
    assert Decoded.only_read_here(done.folder)
    assert Decoded(done.folder).scheme(DOWN) == done.job.plan.linears[DOWN].scheme
    assert done.tensors()[f"{DOWN}.weight_rotation"].tolist() == [160]


def test_the_job_is_that_of_the_model_as_it_was_given(done):
    identity = done.job.identity()
    assert identity["model"]["digest"] == InMemory(random_model("tied")).digest()
    assert any("head no longer is the embedding" in note for note in done.job.notes)


def test_an_embedding_step_stores_both_tables(tmp_path):
    run = carry_out(job("rotate", "rtn", "embedding:bits=8"), tmp_path / "out")
    assert set(run.job.plan.tables) == {"model.embed_tokens", "lm_head"}
    stored = run.place.stored(run.job)
    head, table = (stored.tensor(f"{n}.weight") for n in ("lm_head", "model.embed_tokens"))
    assert not torch.allclose(head, table, atol=1e-2)


def test_rotation_saves_four_bit_inputs_with_an_outlier_channel(tmp_path):
    """In the plain basis a planted channel decides every token's scale; in a rotated one it does not."""
    model = random_model("tied")
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            norm.weight.data[5] *= 30
            for linear in readers:
                linear.weight.data[:, 5] /= 30
    before = model(windows("tied")).logits

    def error(*steps):
        one = job_for(InMemory(model), Recipe.parse(steps).steps, windows("tied"))
        run = carry_out(one, tmp_path / str(len(steps)))
        with torch.no_grad():
            after = model_in_memory(run.place.stored(run.job))(windows("tied")).logits
        return float((after - before).norm() / before.norm())

    assert error("rotate", "inputs:bits=4") < 0.6 * error("inputs:bits=4")


def test_a_whole_run_says_what_became_of_the_head(tmp_path):
    from frugallm.models import open_checkpoint
    from small_job import SmallJob, write_model, write_text

    model = write_model(tmp_path / "model", tie_word_embeddings=True)
    given = SmallJob(model, write_text(tmp_path / "text.txt"), ("rotate", "rtn"), tmp_path / "out")
    report = given.run()
    assert report.job.model_digest == open_checkpoint(model).digest()
    assert any("head no longer is the embedding" in note for note in report.notes)
    before, after = report.models
    assert after.part_bytes["embedding and head"] == 2 * before.part_bytes["embedding and head"]
    manifest = json.loads((given.out / "manifest.json").read_text())
    assert manifest["job"]["model"]["digest"] == report.job.model_digest
    assert manifest["job"]["recipe"][0]["rotate"]["online"] == "rounded"


def test_a_killed_run_goes_on_in_the_same_basis(tmp_path, done):
    from frugallm.conformance.block_methods import Killed, KilledAfter

    with pytest.raises(Killed):
        carry_out(job(*W4A4), tmp_path / "out", KilledAfter(1))
    assert carry_out(job(*W4A4), tmp_path / "out", resume=True).digest() == done.digest()


def test_inspect_says_where_rotation_does_not_apply():
    from frugallm.cli.inspect import describe
    from frugallm.conformance.families import variant

    def line(name):
        return next(x for x in describe(InMemory(variant(name))) if x.startswith("  rotate "))

    assert "does not apply" in line("gemma3") and "cannot be rotated" in line("gemma3")
    assert "does not apply" not in line("llama")
