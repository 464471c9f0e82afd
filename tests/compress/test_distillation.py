"""Training of codes: what is trained, what comes out, and that it only ever gets better on what was held out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frugallm.compress.plan import Plan
from frugallm.compress.quantize import distillation
from frugallm.compress.quantize.distillation import Schedule, distill_codes, error, latent, rounded
from frugallm.compress.quantize.grids import encode, fit, round_to_nearest
from frugallm.conformance.trial import random_model, windows
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.formats.rounded_inputs import nearest, round_activations, round_inputs
from frugallm.models.in_memory import InMemory
from frugallm.walk.reconstruction import Reconstruction
from frugallm.walk.walk import Walk

NOTHING = Plan(rewrites=(), linears={}, tables={}, left_alone=())
SCHEMES = (
    WeightScheme(bits=3, group_size=16),
    WeightScheme(bits=4, symmetric=False),
    WeightScheme(bits=2, symmetric=False, group_size=16, zero_dtype="float16"),
)


def weight_of(rows=5, width=32, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def stored_on(weight, scheme):
    if scheme.zero_dtype == "float16":
        scale, _ = fit(weight, scheme.model_copy(update={"zero_dtype": "int8"}))
        zero = torch.full(scale.shape, 0.3, dtype=torch.float16)
        return QuantizedTensor(encode(weight, scale, zero, scheme), scale, zero, scheme)
    return round_to_nearest(weight, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_latent_is_where_the_weight_lies_between_codes(scheme):
    weight = weight_of()
    q = stored_on(weight, scheme)
    place = latent(weight, q)
    assert torch.equal(rounded(place, q).codes, q.codes.float())
    assert ((place - q.codes).abs() <= 0.5).all()
    low, high = scheme.code_range
    inside = (place != low) & (place != high)  # the rest is cut off
    assert inside.float().mean() > 0.7
    back = replace(q, codes=place).dequantize()
    torch.testing.assert_close(back[inside], weight[inside], rtol=1e-4, atol=1e-5)


def test_codes_that_a_solver_moved_begin_in_their_middle():
    weight, scheme = weight_of(), WeightScheme(bits=3)
    q = round_to_nearest(weight, scheme)
    moved = replace(q, codes=(q.codes + 1).clamp(*scheme.code_range))
    place = latent(weight, moved)
    other = moved.codes != q.codes
    assert other.any() and torch.equal(place[other], moved.codes[other].float())
    assert torch.equal(rounded(place, moved).codes, moved.codes.float())


def test_gradients_pass_straight_through_within_the_codes_and_stop_outside():
    scheme = WeightScheme(bits=3, group_size=16)
    q = round_to_nearest(weight_of(), scheme)
    place = latent(weight_of(), q)
    place[0, 0], place[1, 1] = 9.0, -20.0
    frozen = torch.zeros(place.shape, dtype=torch.bool)
    frozen[2, 2] = True
    place.requires_grad_()
    pull = weight_of(seed=1)
    (rounded(place, q, frozen).dequantize() * pull).sum().backward()
    direct = pull.view(5, 2, 16) * q.scale.float()[..., None]
    direct = direct.view_as(pull).clone()
    direct[0, 0] = direct[1, 1] = direct[2, 2] = 0
    torch.testing.assert_close(place.grad, direct)


def test_rounded_inputs_are_the_same_numbers_whether_or_not_gradients_pass():
    x = 3 * torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(0))
    learns = x.clone().requires_grad_()
    for scheme in (
        ActivationScheme(bits=4),
        ActivationScheme(bits=8, dynamic=False),
        ActivationScheme(outliers=6.0),
    ):
        parameters = {"input_scale": torch.tensor([0.02])}
        assert torch.equal(
            round_activations(x, scheme, parameters), round_activations(learns, scheme, parameters)
        )
    floats = ActivationScheme(bits=8, grid="e4m3")
    got = round_activations(learns, floats, {})
    torch.testing.assert_close(got, round_activations(x, floats, {}), rtol=1e-6, atol=1e-6)
    got.sum().backward()
    assert (learns.grad - 1).abs().median() < 0.1  # of all but the largest of a token
    learns.grad = None
    assert torch.equal(nearest(torch.tensor([0.5, 1.5, -2.5])), torch.tensor([0.0, 2.0, -2.0]))
    (nearest(learns) ** 2).sum().backward()
    assert torch.equal(learns.grad, 2 * learns.detach().round())


def test_every_token_counts_by_its_own_size():
    target = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    assert float(error(target + torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), target)) == pytest.approx(
        1 / 25 / 2
    )
    far = target + torch.tensor([[[0.0, 0.0], [0.0, 100.0]]])
    assert float(error(far, target)) == pytest.approx(1e4 / 25e4 / 2)


def task_of(tmp_path, *, bits=3, activations=None, count=6, seed=0):
    """A block of a random model whose linears were rounded to nearest."""
    checkpoint = InMemory(random_model("tied"))
    walk = Walk(
        checkpoint, NOTHING, windows("tied")[:count], tmp_path, fast=torch.float32, stored=torch.float32
    )
    walk.embed(lambda start, stop: checkpoint.rows("model.embed_tokens.weight", start, stop))
    block, target = walk.load(0), walk.load(0)
    linears = {p: round_to_nearest(block.weight(p), WeightScheme(bits=bits)) for p in block.linears}
    weights = {p: block.weight(p) for p in block.linears}
    for path, q in linears.items():
        block.set_weight(path, q.dequantize())
        if activations is not None:
            round_inputs(block.module.get_submodule(path), activations, {})
    return Reconstruction(block, target, weights, linears, {}, walk.hidden, None, walk.calls[0], seed)


def test_windows_are_trained_on_or_held_out(tmp_path):
    task = task_of(tmp_path)
    train, held = task.windows()
    assert len(held) == 1 and sorted([*train.tolist(), *held.tolist()]) == list(range(6))
    train, held = task_of(tmp_path, count=1).windows()
    assert train.tolist() == held.tolist() == [0]


@pytest.mark.parametrize("activations", [None, ActivationScheme(bits=8)])
def test_training_lowers_the_held_out_error_and_keeps_the_grid(activations, tmp_path):
    task = task_of(tmp_path, activations=activations)
    result = distill_codes(task, Schedule(steps=24, rate=0.02, batch=2, streams="stored"))
    assert result.after < 0.9 * result.before
    for path, q in result.linears.items():
        start = task.linears[path]
        assert q.codes.dtype is torch.int8 and q.scale is start.scale and q.scheme == start.scheme
        low, high = q.scheme.code_range
        assert low <= int(q.codes.min()) and int(q.codes.max()) <= high
    assert any(not torch.equal(q.codes, task.linears[p].codes) for p, q in result.linears.items())
    # what is reported is the error of what is returned
    with torch.no_grad():
        _, held = task.windows()
        x, _ = task.inputs("stored", held)
        out = task.outputs(x, {p: q.dequantize() for p, q in result.linears.items()})
        assert float(error(out, task.targets(x))) == pytest.approx(result.after, rel=1e-5)


def test_the_same_seed_trains_the_same_codes_and_another_does_not(tmp_path):
    schedule = Schedule(steps=8, rate=0.02, batch=2, streams="stored")
    one, two, other = (distill_codes(task_of(tmp_path, seed=s), schedule) for s in (1, 1, 2))
    assert all(torch.equal(q.codes, two.linears[p].codes) for p, q in one.linears.items())
    assert any(not torch.equal(q.codes, other.linears[p].codes) for p, q in one.linears.items())


def test_what_gets_worse_is_not_kept(tmp_path):
    task = task_of(tmp_path)
    result = distill_codes(task, Schedule(steps=4, rate=50.0, batch=2, streams="stored"))
    assert result.after == result.before
    assert all(torch.equal(q.codes, task.linears[p].codes) for p, q in result.linears.items())


def test_pruned_entries_keep_their_codes(tmp_path):
    task = task_of(tmp_path)
    frozen = {p: q.codes % 2 == 0 for p, q in task.linears.items()}
    result = distill_codes(
        replace(task, frozen=frozen), Schedule(steps=8, rate=0.05, batch=2, streams="stored")
    )
    moved = 0
    for path, q in result.linears.items():
        changed = q.codes != task.linears[path].codes
        assert not (changed & frozen[path]).any()
        moved += int(changed.sum())
    assert moved


def test_only_the_codes_are_trained(tmp_path):
    task = task_of(tmp_path)
    before = {name: tensor.clone() for name, tensor in task.target.state.items()}
    distill_codes(task, Schedule(steps=2, rate=0.02, batch=2, streams="stored"))
    assert all(torch.equal(task.target.state[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in task.block.module.parameters())
    assert distillation.JUDGED > 1
