"""RPTQ: k-means against every partition there is, rounding against its equations in float64, and the folder."""

import itertools

import pytest
import torch

from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.clusters import cluster_grid, k_means
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.rptq import RPTQ
from frugallm.conformance.families import variant
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import DataError
from frugallm.formats.decoded import Decoded, Own
from frugallm.formats.engines import engines_for, loads_in_transformers
from frugallm.formats.packed_folder import load_packed
from frugallm.formats.quantized_tensor import ActivationScheme
from frugallm.formats.rounded_inputs import round_activations
from frugallm.formats.stored import model_in_memory
from frugallm.models.in_memory import InMemory


def spread(points, labels):
    """Return the squared distances from the means of the clusters, summed."""
    groups = [points[labels == label] for label in labels.unique()]
    return float(sum((group - group.mean(0)).square().sum() for group in groups))


@pytest.mark.parametrize("seed", range(4))
def test_k_means_finds_the_best_of_all_partitions(seed):
    points = torch.randn(7, 2, generator=torch.Generator().manual_seed(seed)).double()
    best = min(spread(points, torch.tensor(labels)) for labels in itertools.product(range(3), repeat=7))
    found = k_means(points, 3)
    assert spread(points, found) == pytest.approx(best)
    assert torch.equal(found, k_means(points, 3))


def test_clusters_apart_are_found_and_points_alike_stay_together():
    centers = torch.tensor([[0.0, 0.0], [50.0, 1.0], [0.0, -50.0], [50.0, -50.0]])
    points = (centers[:, None] + torch.rand(4, 9, 2)).view(-1, 2)
    labels = k_means(points, 4).view(4, 9)
    assert torch.equal(labels, labels[:, :1].expand(4, 9)) and len(labels.unique()) == 4
    two = k_means(torch.tensor([[1.0, 0.0], [2.0, 0.0]]).repeat(5, 1), 4)
    assert two.view(5, 2).unique(dim=0).shape == (1, 2) and len(two.unique()) == 2


def inputs(tokens=60):
    """Inputs of three kinds of channels: around zero, far to one side, and never anything."""
    x = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(0))
    x[:, 4:8] = x[:, 4:8] * 0.5 + 30
    x[:, 8:10] *= 20
    x[:, 10:] = 0
    return x


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clusters", [1, 3, 12])
def test_rounding_is_that_of_the_formula(bits, clusters):
    x = inputs()
    extremes = torch.stack([x.amin(0), x.amax(0)])
    step = RPTQ(input_bits=bits, clusters=clusters)
    scheme = step.activations("x")
    stored = step.input_parameters(scheme, {"extremes": extremes})
    labels, wanted = stored["input_clusters"], x.double().clone()
    assert stored["input_scale"].shape == stored["input_zero_point"].shape == (clusters,)
    for label in labels.unique():
        columns = labels == label
        low, high = float(extremes[0, columns].min()), float(extremes[1, columns].max())
        if high == low:
            continue
        s = torch.tensor((high - low) / (2**bits - 1)).double()
        z = torch.round(-(2 ** (bits - 1)) - low / s)
        codes = (torch.round(x[:, columns].double() / s) + z).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        wanted[:, columns] = s * (codes - z)
    rounded = round_activations(x, scheme, stored)
    assert (rounded - wanted).abs().max() <= 1e-4
    worst = (rounded - x).abs().amax(0)
    assert bool(
        (worst <= 0.501 * stored["input_scale"][labels.long()] + 1e-4).all()
    )  # both ends are on the grid
    outside = round_activations(torch.full((1, 12), 1e3), scheme, stored)
    step = stored["input_scale"].max()
    assert bool((outside <= extremes[1].max() + 0.501 * step).all())  # what was never seen is cut off


def test_channels_far_from_zero_have_a_step_that_their_zero_point_can_hold():
    extremes = torch.tensor([[1000.0, 0.0], [1000.001, 0.0]])
    scale, zero = cluster_grid(extremes, torch.tensor([0, 1]), 3, (-128, 127))
    assert zero.dtype is torch.int16 and float((zero[0] * scale[0]).abs()) == pytest.approx(1000, rel=0.02)
    assert scale.isfinite().all() and (scale > 0).all() and zero[2] == -128


def test_clusters_lose_less_than_one_grid_and_chance_hardly_less():
    x = inputs()
    extremes = torch.stack([x.amin(0), x.amax(0)])

    def error(**parameters):
        step = RPTQ(input_bits=6, **parameters)
        stored = step.input_parameters(step.activations("x"), {"extremes": extremes})
        return float((round_activations(x, step.activations("x"), stored) - x).square().mean())

    one, chance, three = error(clusters=1), error(clusters=3, by="chance"), error(clusters=3)
    assert three < 0.5 * chance and chance <= one * 1.1
    sizes = RPTQ(clusters=5, by="chance").at_random(extremes).bincount()
    assert sizes.tolist() == [3, 3, 2, 2, 2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    job = job_for(InMemory(random_model("tied")), [RPTQ(input_bits=6), GPTQ(bits=4)], windows("tied"))
    return carry_out(job, tmp_path_factory.mktemp("rptq") / "run")


def test_a_later_step_rounds_the_weights_on_inputs_in_clusters(run):
    schemes = {plan.scheme.label() for plan in run.job.plan.linears.values()}
    assert schemes == {"W4 g32 symmetric, A6 static, 4 clusters"}
    assert {plan.solver.name() for plan in run.job.plan.linears.values()} == {"gptq"}
    q, k = (run.tensors()[f"model.layers.0.self_attn.{name}_proj.input_clusters"] for name in "qk")
    assert torch.equal(q, k) and q.dtype is torch.uint8 and int(q.max()) == 3


def test_the_folder_is_read_back_as_it_was_kept_and_transformers_refuses_it(run):
    from transformers import AutoModelForCausalLM

    tokens = windows("tied")
    with torch.no_grad():
        kept = model_in_memory(run.place.stored(run.job))(tokens).logits
        read = load_packed(Decoded(run.folder), torch.float32)(tokens).logits
        dense = load_packed(Decoded(run.folder), torch.float32)
        for module in dense.modules():
            module._forward_pre_hooks.clear()
        unrounded = dense(tokens).logits
    assert torch.equal(read, kept) and not torch.allclose(unrounded, kept, rtol=1e-3)
    assert Decoded.only_read_here(run.folder) and not loads_in_transformers(run.job.plan)
    (row,) = (row for row in engines_for(run.job.plan) if row.engine == "transformers")
    assert row.seen == "no" and "clusters" in row.note
    with pytest.raises(ValueError, match="clusters"):
        AutoModelForCausalLM.from_pretrained(str(run.folder))


def test_gpt2_is_read_back_too(tmp_path):
    tokens = torch.randint(67, (6, 48), generator=torch.Generator().manual_seed(7))
    run = carry_out(job_for(InMemory(variant("gpt2")), [RPTQ()], tokens), tmp_path / "run")
    with torch.no_grad():
        kept = model_in_memory(run.place.stored(run.job))(tokens).logits
        assert torch.equal(load_packed(Own(run.folder), torch.float32)(tokens).logits, kept)


def test_experts_without_a_token_are_refused_in_one_line(tmp_path):
    job = job_for(InMemory(variant("qwen3_moe")), [RPTQ()], torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="no calibration token reached"):
        carry_out(job, tmp_path / "run")


def test_what_is_in_clusters_has_a_name_of_its_own():
    plan = make_plan(
        [RPTQ(clusters=2, only=("*.mlp.*",)), GPTQ(skip=("*.mlp.*",))], InMemory(random_model("tied"))
    )
    labels = {plan.scheme.activations.label() for plan in plan.linears.values() if plan.scheme.activations}
    assert labels == {ActivationScheme(dynamic=False, clusters=2).label()} == {"A8 static, 2 clusters"}
