"""The walk against the plain model: the same hidden states, and statistics of the right inputs."""

import pytest
import torch

from frugallm.compress.plan import Plan
from frugallm.conformance.trial import KINDS, carry_out, job_for, random_model, windows
from frugallm.formats.rounded_inputs import round_activations, static_scale
from frugallm.formats.stored import model_in_memory
from frugallm.formats.verify import relative_error
from frugallm.models.in_memory import InMemory
from frugallm.models.open import dense_model
from frugallm.recipe import Recipe
from frugallm.walk import hidden
from frugallm.walk.hidden import HiddenStates
from frugallm.walk.statistics import (
    SAMPLE_TOKENS,
    AbsMax,
    AbsMean,
    Extremes,
    Gather,
    MeanSquare,
    Sample,
    SecondMoment,
)
from frugallm.walk.walk import Walk

NOTHING = Plan(rewrites=(), linears={}, tables={}, left_alone=())


def walk_of(checkpoint, tokens, tmp_path, **options):
    options = {"fast": torch.float32, "stored": torch.float32, **options}
    walk = Walk(checkpoint, NOTHING, tokens, tmp_path, **options)
    walk.embed(lambda start, stop: checkpoint.rows("model.embed_tokens.weight", start, stop))
    return walk


def inputs_of(model, tokens):
    """Inputs of every linear of every block, ``(tokens, in)``, as the plain model sees them."""
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1).clone())
            )
    with torch.no_grad():
        model(tokens)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens_per_batch", [64, 4096])
def test_unchanged_blocks_give_the_hidden_states_of_the_plain_model(
    kind, tokens_per_batch, tmp_path, monkeypatch
):
    monkeypatch.setattr(hidden, "TOKENS_PER_BATCH", tokens_per_batch)
    checkpoint = InMemory(random_model(kind))
    with torch.no_grad():
        states = dense_model(checkpoint).model(windows(kind), output_hidden_states=True)
    walk = walk_of(checkpoint, windows(kind), tmp_path)
    assert torch.equal(walk.hidden.values, states.hidden_states[0])
    for index in range(len(walk) - 1):
        walk.solve(index)
        wanted = states.hidden_states[index + 1]
        assert (walk.hidden.values - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    walk.solve(len(walk) - 1)
    normed = checkpoint.tensor("model.norm.weight") * torch.nn.functional.rms_norm(
        walk.hidden.values, walk.hidden.values.shape[-1:], eps=checkpoint.config.rms_norm_eps
    )
    assert (normed - states.last_hidden_state).abs().max() <= 1e-5 * states.last_hidden_state.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_replaying_is_solving_without_changing(kind, tmp_path):
    checkpoint = InMemory(random_model(kind))
    one, two = (walk_of(checkpoint, windows(kind), tmp_path) for _ in range(2))
    state = one.solve(0).block.state
    two.replay(0, state, lambda _: None)
    assert torch.equal(one.hidden.values, two.hidden.values)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_plain_models_inputs(kind, tmp_path):
    checkpoint = InMemory(random_model(kind))
    seen = inputs_of(dense_model(checkpoint), windows(kind))
    walk = walk_of(checkpoint, windows(kind), tmp_path)
    before = walk.hidden.values.clone()
    block = walk.load(0)
    observed = walk.observe(block, frozenset({"absmax", "absmean", "mean_square", "second_moment"}))
    assert torch.equal(walk.hidden.values, before)
    assert observed.keys() == {site.name for site in checkpoint.family.sites(checkpoint.config, 0)}
    for name, statistics in observed.items():
        x = seen[block.full_name(name)]
        torch.testing.assert_close(statistics["absmax"], x.abs().amax(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            statistics["mean_square"], x.double().square().mean(0).float(), rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(statistics["absmean"], x.abs().mean(0), rtol=1e-4, atol=1e-6)
        direct = (x.double().T @ x.double() / len(x)).float()
        torch.testing.assert_close(
            statistics["second_moment"], direct, rtol=1e-3, atol=1e-4 * float(direct.max())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_pieces_are_those_of_the_whole(dtype):
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    gather = Gather({"absmax", "absmean", "extremes", "mean_square", "sample", "second_moment"}, 24)
    for piece in (x[:7].view(1, 7, 24), x[7:8], x[8:].view(2, 21, 24)):
        gather.add(piece)
    values = gather.values()
    assert torch.equal(x, before)
    assert torch.equal(values["absmax"], x.float().abs().amax(0))
    assert torch.equal(values["extremes"], torch.stack([x.amin(0), x.amax(0)]).float())
    assert torch.equal(values["sample"], x.float())  # all of them, as they are few
    mean = x.double().square().mean(0)
    torch.testing.assert_close(values["mean_square"].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(values["absmean"].double(), x.double().abs().mean(0), rtol=1e-6, atol=0)
    exact = x.double().T @ x.double() / 50
    assert torch.equal(values["second_moment"], values["second_moment"].T)
    # bfloat16 inputs lose nothing: their products are exact in float32, only the order of sums differs
    torch.testing.assert_close(values["second_moment"].double(), exact, rtol=1e-5, atol=1e-6)
    assert all(v.dtype is torch.float32 for v in values.values())


def test_without_any_token_all_inputs_count_alike():
    assert torch.equal(SecondMoment(3).value(), torch.eye(3))
    assert torch.equal(AbsMax(3).value(), torch.zeros(3))
    assert torch.equal(MeanSquare(3).value(), torch.zeros(3))
    assert torch.equal(AbsMean(3).value(), torch.zeros(3))
    assert torch.equal(Extremes(3).value(), torch.zeros(2, 3))
    assert Sample(3).value().shape == (0, 3)


@pytest.mark.parametrize("tokens", [SAMPLE_TOKENS - 1, SAMPLE_TOKENS, 700, 9000])
def test_a_sample_is_bounded_spread_and_the_same_for_all_pieces(tokens):
    x = torch.arange(tokens, dtype=torch.float32)[:, None].expand(-1, 2)
    found = []
    for size in (tokens, 100, 7):
        sample = Sample(2)
        for piece in x.split(size):
            sample.add(piece)
            assert size > 100 or len(sample.kept) < 2 * SAMPLE_TOKENS + size
        found.append(sample.value())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    kept = found[0][:, 0]
    assert len(kept) == min(tokens, SAMPLE_TOKENS)
    gaps = kept.diff()
    assert kept[0] == 0 and gaps.min() > 0 and gaps.max() <= 2 * gaps.min()
    assert tokens - kept[-1] <= 2 * gaps.max()


@pytest.mark.parametrize("steps", [["gptq:bits=3"], ["smoothquant", "gptq:bits=8,group_size=-1"]])
def test_spilled_hidden_states_give_the_same_bytes_and_leave_no_file(steps, tmp_path):
    runs = []
    for number, limit in enumerate((2**30, 0)):
        checkpoint = InMemory(random_model("tied"))
        job = job_for(checkpoint, Recipe.parse(steps).steps, windows("tied"), hidden_limit=limit)
        runs.append(carry_out(job, tmp_path / str(number)))
        assert not list(runs[-1].place.path.glob("*.bin"))
    assert runs[0].digest() == runs[1].digest()


def test_hidden_states_past_the_limit_lie_in_a_file(tmp_path):
    kept, spilled = (
        HiddenStates((5, 3, 4), torch.float32, tmp_path / f"{limit}.bin", limit)
        for limit in (5 * 3 * 4 * 4, 239)
    )
    assert not kept.spilled and spilled.spilled
    assert not (tmp_path / "240.bin").exists()
    assert (tmp_path / "239.bin").stat().st_size == kept.bytes == 240
    for states in (kept, spilled):
        states.step = 2
        for number, batch in enumerate(states.batches()):
            states[batch] = torch.full((batch.stop - batch.start, 3, 4), float(number))
    assert torch.equal(kept.values, spilled.values)
    assert kept.values[:, 0, 0].tolist() == [0, 0, 1, 1, 2]
    spilled.close()
    assert not (tmp_path / "239.bin").exists()


def test_a_linear_sees_what_is_stored_before_it(tmp_path):
    """Down projections are solved on inputs that have passed through the rounded gate and up projections."""
    checkpoint = InMemory(random_model("tied"))
    job = job_for(
        checkpoint, Recipe.parse(["rtn:bits=2,only=[*.mlp.*]"]).steps, windows("tied"), stored=torch.float32
    )
    walk = Walk(checkpoint, job.plan, windows("tied"), tmp_path, fast=torch.float32, stored=torch.float32)
    walk.embed(lambda start, stop: checkpoint.rows("model.embed_tokens.weight", start, stop))
    done = walk.solve(0)
    model = dense_model(checkpoint)
    model.get_submodule("model.layers.0").load_state_dict(done.block.state)
    with torch.no_grad():
        wanted = model.model(windows("tied"), output_hidden_states=True).hidden_states[1]
    assert (walk.hidden.values - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not torch.equal(
        done.block.weight("mlp.up_proj"), checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    )


def test_static_input_scales_cover_the_largest_input(tmp_path):
    checkpoint = InMemory(random_model("tied"))
    job = job_for(
        checkpoint, Recipe.parse(["smoothquant:sites=[]"]).steps, windows("tied"), stored=torch.float32
    )
    seen = inputs_of(dense_model(checkpoint), windows("tied"))
    run = carry_out(job, tmp_path / "run")
    name = "model.layers.0.self_attn.q_proj"  # nothing before it is rounded
    scale = run.tensors()[f"{name}.input_scale"]
    assert scale.shape == (1,) and scale.dtype is torch.float32
    torch.testing.assert_close(scale, seen[name].abs().max().reshape(1) / 127.5, rtol=1e-5, atol=0)
    assert len([n for n in run.tensors() if n.endswith("input_scale")]) == len(job.plan.linears)


@pytest.mark.parametrize("steps", [["smoothquant:token=[*.down_proj]"], ["smoothquant:activation=token"]])
def test_inputs_with_a_scale_a_token_store_none(steps, tmp_path):
    run = carry_out(
        job_for(InMemory(random_model("tied")), Recipe.parse(steps).steps, windows("tied")), tmp_path / "r"
    )
    without = [n for n, p in run.job.plan.linears.items() if p.scheme.activations.dynamic]
    assert without
    assert all((f"{n}.input_scale" in run.tensors()) == (n not in without) for n in run.job.plan.linears)


def test_rounding_of_activations_is_that_of_compressed_tensors():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    from frugallm.formats.quantized_tensor import ActivationScheme

    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * 4
    x[0, 0] = 0
    token = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, token, torch.nn.Linear(16, 1))
    ours = round_activations(x, ActivationScheme(dynamic=True), {})
    torch.testing.assert_close(ours, fake_quantize(x, scale, zero, token))
    scheme = ActivationScheme(dynamic=False)
    fixed = static_scale(
        x.flatten(0, 1).abs().amax(0) * 0.5, scheme
    )  # half of the inputs are beyond the range
    tensor = QuantizationArgs(num_bits=8, symmetric=True, strategy="tensor")
    torch.testing.assert_close(
        round_activations(x, scheme, {"input_scale": fixed}), fake_quantize(x, fixed, torch.zeros(1), tensor)
    )
    assert static_scale(torch.zeros(4), scheme) > 0


@pytest.mark.parametrize(
    "pattern", ["skip=[*.layers.1.*]", "skip=[*.self_attn.o_proj,*.down_proj]", "only=[*.mlp.*]"]
)
def test_skipped_linears_are_the_originals_in_16_bits(pattern, tmp_path):
    checkpoint = InMemory(random_model("tied"))
    run = carry_out(
        job_for(checkpoint, Recipe.parse([f"gptq:{pattern}"]).steps, windows("tied")), tmp_path / "run"
    )
    tensors = run.tensors()
    assert run.job.plan.left_alone and run.job.plan.linears
    for name in run.job.plan.left_alone:
        assert torch.equal(tensors[f"{name}.weight"], checkpoint.tensor(f"{name}.weight").bfloat16())
    for name in run.job.plan.linears:
        assert f"{name}.weight_packed" in tensors and f"{name}.weight" not in tensors


@pytest.mark.parametrize("activation", ["static", "token"])
@pytest.mark.parametrize("only", ["*.q_proj", "*.o_proj", "*.up_proj", "*.down_proj"])
def test_inputs_are_rounded_on_the_way_as_they_will_be(activation, only, tmp_path):
    """The next block sees what the stored model computes, the rounding of inputs at every site included."""
    step = f"smoothquant:sites=[],activation={activation},only=[{only}]"
    checkpoint = InMemory(random_model("tied"))
    job = job_for(checkpoint, Recipe.parse([step]).steps, windows("tied"), stored=torch.float32)
    stored = carry_out(job, tmp_path / "run").place.stored(job)
    walk = Walk(checkpoint, job.plan, windows("tied"), tmp_path, fast=torch.float32, stored=torch.float32)
    walk.embed(lambda start, stop: checkpoint.rows("model.embed_tokens.weight", start, stop))
    walk.solve(0)
    with torch.no_grad():
        rounded, exact = (
            model.model(windows("tied"), output_hidden_states=True).hidden_states[1]
            for model in (model_in_memory(stored), dense_model(stored))
        )
    apart = relative_error(walk.hidden.values, rounded)
    assert apart < 0.01 * relative_error(rounded, exact)
