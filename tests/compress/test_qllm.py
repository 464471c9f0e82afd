"""QLLM: splitting changes nothing, sharing is the paper's formula, the search picks by the output's error, and it is stored."""

from __future__ import annotations

import pytest
import torch

from frugallm.compress.plan import make_plan
from frugallm.compress.prune.unstructured.magnitude import Magnitude
from frugallm.compress.quantize.qllm import (
    QLLM,
    distances,
    output_error,
    parts_of,
    reassemble,
    search,
    smallest_threshold,
)
from frugallm.compress.quantize.rtn import RTN
from frugallm.conformance.block_methods import Killed, KilledAfter
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import RecipeError
from frugallm.formats.channels import Reassembly
from frugallm.formats.decoded import Decoded
from frugallm.formats.extras import Channels
from frugallm.formats.quantized_tensor import ActivationScheme
from frugallm.formats.rounded_inputs import round_activations
from frugallm.formats.stored import model_in_memory
from frugallm.job import layer_facts
from frugallm.models.in_memory import InMemory
from frugallm.models.open import dense_model

A4 = ActivationScheme(bits=4, reassembled=True)
WIDTH = 24


def example(seed=0, outliers=((3, 30.0), (10, 12.0))):
    """Inputs ``(tokens, in)`` with large channels, and a weight that reads them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, WIDTH, generator=generator, dtype=torch.float64)
    for channel, size in outliers:
        x[:, channel] *= size
    return x, torch.randn(7, WIDTH, generator=generator, dtype=torch.float64)


def expanded(reassembly, x):
    """The inputs as an engine would have them: every part of a split channel."""
    values = reassembly.gathered(x)
    return values.repeat_interleave(reassembly.parts[reassembly.first].long(), -1)


def test_splitting_alone_is_exact_and_only_the_largest_value_falls():
    x, weight = example()
    apart = reassemble(x.abs().amax(0), 5.0, None)
    wide = expanded(apart, x)
    assert wide.shape[1] > WIDTH and wide.abs().max() <= 5.0 < x.abs().max()
    torch.testing.assert_close(wide @ apart.columns(weight).T, x @ weight.T)
    torch.testing.assert_close(apart.spread(apart.gathered(x)), x)
    torch.testing.assert_close(apart.plain(apart.columns(weight)), weight)
    assert torch.equal(apart.parts.long(), (x.abs().amax(0) / 5).ceil().clamp(min=1).long())


def test_sharing_keeps_the_width_and_is_the_mean_times_the_sum():
    x, weight = example()
    cost = distances(x, weight.T @ weight)
    both = reassemble(x.abs().amax(0), 9.0, cost)
    columns = both.columns(weight)
    assert columns.shape == weight.shape and expanded(both, x).shape == x.shape
    wanted = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for group in both.groups.unique():
        members = (both.groups == group).nonzero()[:, 0]
        wanted += x[:, members].mean(1, keepdim=True) @ weight[:, members].sum(1)[None]
        assert len(members) == 1 or bool((both.parts[members] == 1).all())
    assert not torch.allclose(wanted, x @ weight.T)
    torch.testing.assert_close(expanded(both, x) @ columns.T, wanted)
    # the same as a map of inputs to inputs in front of a plain weight
    torch.testing.assert_close(both.spread(both.gathered(x)) @ both.plain(columns).T, wanted)


def test_the_cost_of_sharing_is_the_squared_error_that_it_makes():
    x, weight = example(outliers=())
    cost = distances(x, weight.T @ weight)
    for i, j in ((0, 1), (4, 17)):
        before = x[:, [i, j]] @ weight[:, [i, j]].T
        after = x[:, [i, j]].mean(1, keepdim=True) @ weight[:, [i, j]].sum(1)[None]
        assert float(cost[i, j]) == pytest.approx(float((before - after).square().sum() / len(x)))


def test_channels_that_are_alike_share_first():
    x, weight = example()
    x[:, 8] = x[:, 15] + 1e-4
    both = reassemble(x.abs().amax(0), float(x[:, 3].abs().max()) * 0.99, distances(x, weight.T @ weight))
    assert int(both.parts.sum()) == WIDTH + 1 and int(both.parts[3]) == 2
    assert int(both.groups[8]) == int(both.groups[15])
    assert len(both.groups.unique()) == WIDTH - 1


def test_where_nothing_is_left_to_share_there_is_no_answer():
    x, weight = example()
    assert reassemble(x.abs().amax(0), 1e-3, distances(x, weight.T @ weight)) is None


@pytest.mark.parametrize("most", [0, 3, 9])
def test_the_smallest_threshold_adds_at_most_so_many_parts(most):
    absmax = example()[0].abs().amax(0)
    threshold = smallest_threshold(absmax, most)
    added = int((parts_of(absmax, threshold) - 1).sum())
    assert added <= most and (added == most or most == 9)
    assert int((parts_of(absmax, threshold - 2e-3 * float(absmax.max())) - 1).sum()) > most


def test_the_search_beats_rounding_as_it_is_and_finds_the_best_of_its_candidates():
    x, weight = example()
    x, moment = x.float(), (weight.T @ weight).float()
    absmax = x.abs().amax(0)
    found = search(absmax, x, moment, A4, 0.4, 16)
    none = Reassembly.none(WIDTH)
    ours, naive = output_error(x, found, moment, A4), output_error(x, none, moment, A4)
    direct = (round_activations(x, A4, found.tensors()) - x).double() @ weight.T
    assert ours == pytest.approx(float(direct.square().sum()), rel=1e-4)
    assert ours < 0.8 * naive
    low, high = smallest_threshold(absmax, int(0.4 * WIDTH)), float(absmax.max())
    for share in torch.arange(16) / 16:
        tried = reassemble(absmax, low + (high - low) * float(share), distances(x, moment))
        assert tried is None or ours <= output_error(x, tried, moment, A4) * (1 + 1e-6)


def test_without_room_for_parts_nothing_is_split():
    x, weight = example()
    moment = (weight.T @ weight).float()
    found = search(x.abs().amax(0).float(), x.float(), moment, A4, 0.0, 8)
    assert torch.equal(found.groups, Reassembly.none(WIDTH).groups) and bool((found.parts == 1).all())
    plain = round_activations(x.float(), ActivationScheme(bits=4), {})
    assert torch.equal(round_activations(x.float(), A4, found.tensors()), plain)


def test_the_scale_of_a_token_is_that_of_its_parts():
    x = torch.tensor([[8.0, 1.0, -0.6, 0.5]])
    apart = Reassembly(
        torch.tensor([0, 1, 2, 3], dtype=torch.int32), torch.tensor([8, 1, 1, 1], dtype=torch.int16)
    )
    step = 1.0 / 7.5
    wanted = torch.tensor([[8 * 7 * step, 7 * step, round(-0.6 / step) * step, round(0.5 / step) * step]])
    torch.testing.assert_close(round_activations(x, A4, apart.tensors()), wanted)


def model_of(kind):
    """A random model whose down-projections read three channels that are thirty times as large as before."""
    model = random_model(kind)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[:3] *= 30
        layer.mlp.down_proj.weight[:, :3] /= 30
    return model


def run_of(tmp_path, name="out", kind="tied", **parameters):
    step = QLLM(**{"steps": 0, **parameters})
    return carry_out(job_for(InMemory(model_of(kind)), [step], windows(kind)), tmp_path / name)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_folder_is_read_back_to_the_same_logits(kind, tmp_path):
    run = run_of(tmp_path, kind=kind)
    stored = run.place.stored(run.job)
    name = "model.layers.0.mlp.down_proj"
    parameters = stored.input_parameters(name)
    assert set(parameters) == {"input_groups", "input_parts"}
    assert int(parameters["input_parts"].sum()) > len(parameters["input_parts"])  # something is split
    assert len(parameters["input_groups"].unique()) < len(parameters["input_groups"])  # and shared
    decoded = Decoded(run.folder)
    model = dense_model(decoded, torch.float32)
    decoded.prepare(model)
    with torch.inference_mode():
        ours, wanted = model(windows(kind)).logits, model_in_memory(stored)(windows(kind)).logits
    assert torch.equal(ours, wanted)
    assert Decoded.only_read_here(run.folder)


def test_linears_of_a_site_share_their_channels(tmp_path):
    tensors = run_of(tmp_path).tensors()
    q, k = (tensors[f"model.layers.0.self_attn.{p}_proj.input_groups"] for p in "qk")
    assert torch.equal(q, k)
    assert torch.equal(q, tensors["model.layers.0.self_attn.q_proj.weight_channel_groups"])


def test_the_correction_comes_closer_to_the_original_and_resumes(tmp_path):
    parameters = {"steps": 8, "rate": 0.05, "batch": 2}
    run = run_of(tmp_path, **parameters)
    facts = layer_facts(run.job, run.place)
    assert all(f["block_error"] < f["block_error_before"] for f in facts)
    job = job_for(InMemory(model_of("tied")), [QLLM(**parameters)], windows("tied"))
    with pytest.raises(Killed):
        carry_out(job, tmp_path / "killed", KilledAfter(1))
    assert carry_out(job, tmp_path / "killed", resume=True).digest() == run.digest()


def test_without_splitting_weights_are_rounded_to_nearest(tmp_path):
    run = run_of(tmp_path, ratio=0.0, symmetric=True)
    step = RTN(bits=4, group_size=-1)
    nearest = carry_out(job_for(InMemory(model_of("tied")), [step], windows("tied")), tmp_path / "rtn")
    ours, plain = run.place.stored(run.job), nearest.place.stored(nearest.job)
    for name in run.job.plan.linears:
        assert torch.equal(ours.tensor(f"{name}.weight"), plain.tensor(f"{name}.weight"))


def test_the_extra_says_which_channels_its_columns_are():
    extra = Channels(Reassembly.none(5))
    back = Channels.from_tensors(extra.tensors())
    weight = torch.randn(3, 5)
    assert torch.equal(back.apply(weight), weight) and back.rows(0, 1) is back


def test_zeros_of_an_earlier_step_are_refused():
    with pytest.raises(RecipeError, match="another basis"):
        make_plan([Magnitude(), QLLM()], InMemory(random_model("tied")))
