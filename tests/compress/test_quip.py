"""QuIP against its paper's equations, written out in float64, and its basis against what it promises."""

import math

import pytest
import torch
from shapes import moment, random_weight

from frugallm.compress.plan import make_plan
from frugallm.compress.quantize.descent import descend
from frugallm.compress.quantize.grids import encode
from frugallm.compress.quantize.quip import QuIP, _turned_moment, rescaling
from frugallm.compress.quantize.solvers import compensate, proxy_loss
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import RecipeError
from frugallm.formats.decoded import Decoded
from frugallm.formats.extras import INCOHERENT, Incoherence
from frugallm.formats.packed_folder import load_packed
from frugallm.formats.quantized_tensor import WeightScheme
from frugallm.formats.stored import model_in_memory
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe

SCHEME = WeightScheme(bits=3, symmetric=False, zero_dtype="float16", scale_dtype="float32")


def grid(rows, step):
    return torch.full((rows, 1), step), torch.full((rows, 1), -0.5, dtype=torch.float16)


def nearest(w, step, bits):
    """Return the nearest of the levels ``((2 q + 1) / (2^b - 1) - 1) s`` with ``step = 2 s / (2^b - 1)``."""
    half = 2 ** (bits - 1)
    return (torch.floor(w / step).clamp(-half, half - 1) + 0.5) * step


def ldlq(weight, h, step, bits):
    """Round column by column with the feedback of the factors ``H = (A + 1) diag (A + 1)^T``, ``A`` strictly upper."""
    w, width = weight.double(), len(h)
    lower = torch.linalg.cholesky(h.double().flip(0, 1)).flip(0, 1)  # H = R R^T with upper R
    a = lower / lower.diagonal() - torch.eye(width)
    q = torch.zeros_like(w)
    for k in range(width):
        q[:, k] = nearest(w[:, k] + (w[:, :k] - q[:, :k]) @ a[:k, k], step, bits)
    return q


def example(rows=24, width=96):
    weight, h = random_weight(rows, width, 5), moment(width, 4 * width)
    h = h + 0.01 * h.diagonal().mean() * torch.eye(width)
    return weight, h


def share_that_differs(a, b):
    return float((~torch.isclose(a.float(), b.float(), atol=1e-6)).float().mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_column_solve_is_ldlq(bits):
    weight, h = example()
    step = float(weight.square().mean().sqrt()) * 4.8 / (2**bits - 1)
    scheme = SCHEME.model_copy(update={"bits": bits})
    q = compensate(weight, h, *grid(len(weight), step), scheme, damp=0.0, act_order=False)
    assert share_that_differs(q.dequantize(), ldlq(weight, h, step, bits)) <= 2e-3
    assert share_that_differs(q.dequantize(), nearest(weight.double(), step, bits)) > 0.05
    # The authors' code factors H = L D L^T and goes from the last column to the first: the same, columns reversed.
    backwards = compensate(
        weight.flip(1).contiguous(), h.flip(0, 1), *grid(len(weight), step), scheme, damp=0.0, act_order=False
    )
    lower = torch.linalg.cholesky(h.double())
    feedback = lower / lower.diagonal() - torch.eye(len(h))
    w, theirs = weight.double(), torch.zeros(weight.shape, dtype=torch.float64)
    for k in reversed(range(len(h))):
        theirs[:, k] = nearest(w[:, k] + (w - theirs)[:, k + 1 :] @ feedback[k + 1 :, k], step, bits)
    assert share_that_differs(backwards.dequantize().flip(1), theirs) <= 2e-3


def test_without_a_basis_quip_is_ldlq_alone():
    weight, h = example()
    step = float(weight.square().mean().sqrt()) * 4.8 / 7
    method = QuIP(bits=3, incoherence=False, damp=0)
    scheme = method.weights({"x": 96}).model_copy(update={"scale_dtype": "float32"})
    q = method.solve(weight, scheme, {"second_moment": h})
    assert not q.extras and q.scale.unique().numel() == 1
    assert share_that_differs(q.dequantize(), ldlq(weight, h, step, 3)) <= 2e-3


@pytest.mark.parametrize("kind", INCOHERENT)
@pytest.mark.parametrize(("rows", "width"), [(1, 96), (7, 64), (64, 160)])
def test_the_basis_is_undone_and_keeps_the_loss(kind, rows, width):
    weight, h = random_weight(rows, width, 1), moment(width, 3 * width)
    extra = Incoherence.of(rescaling(weight, h), rows, kind, seed=5)
    turned, inside = extra.turn(weight.double()), _turned_moment(h, extra)
    torch.testing.assert_close(extra.apply(turned), weight.double(), rtol=1e-6, atol=1e-8)
    back = Incoherence.from_tensors(extra.tensors())
    torch.testing.assert_close(back.apply(turned.float()), weight, rtol=1e-4, atol=1e-5)
    other = weight + 0.1 * torch.randn(weight.shape)
    loss = proxy_loss(weight.double(), other.double(), h.double())
    same = proxy_loss(turned, extra.turn(other.double()), inside.double())
    assert same == pytest.approx(loss, rel=1e-4)


def test_the_rescaling_is_the_best_diagonal_one():
    weight, h = random_weight(32, 64, 2) * torch.linspace(0.1, 3, 64), moment(64, 300)

    def bound(d):
        return float((h.diagonal() / d.square()).sum() * (weight * d).square().sum())

    best = rescaling(weight, h).float()
    assert bound(best) < bound(torch.ones(64))
    for seed in range(5):
        noise = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        assert bound(best) <= bound(best * torch.exp(0.1 * noise)) * (1 + 1e-6)


@pytest.mark.parametrize("kind", INCOHERENT)
def test_entries_that_stand_out_are_spread(kind):
    weight = random_weight(96, 160, 3)
    weight[::7, ::11] *= 20
    extra = Incoherence.of(torch.ones(160), 96, kind, seed=0)

    def mu(w):
        return float(w.abs().max() * math.sqrt(w.numel()) / w.norm())

    assert mu(extra.turn(weight)) < 0.5 * mu(weight)


def test_rows_of_a_turned_weight_cannot_be_told_apart():
    extra = Incoherence.of(torch.ones(8), 6, "kronecker", 0)
    assert extra.rows(0, 6) is extra
    with pytest.raises(ValueError, match="decode all of it"):
        extra.rows(0, 3)


@pytest.mark.parametrize("bits", [2, 3])
def test_greedy_passes_are_coordinate_descent_and_never_lose(bits):
    weight, h = example()
    step = float(weight.square().mean().sqrt()) * 4.8 / (2**bits - 1)
    scheme = SCHEME.model_copy(update={"bits": bits})
    scale, zero = grid(len(weight), step)
    q = compensate(weight, h, scale, zero, scheme, act_order=False)
    plain, w = q.dequantize().double(), weight.double()
    for k in range(len(h)):
        shift = (plain - w) @ h.double()[:, k] / h[k, k]
        plain[:, k] = nearest(plain[:, k] - shift, step, bits)
    once = descend(weight, h, q, passes=1, block_size=32)
    assert share_that_differs(once.dequantize(), plain) <= 2e-3
    losses = [
        proxy_loss(weight, one.dequantize(), h) for one in (q, once, descend(weight, h, once, passes=3))
    ]
    assert losses[0] > losses[1] >= losses[2] * (1 - 1e-5)
    assert torch.equal(descend(weight, h, q, passes=0).codes, q.codes)


def test_descent_leaves_uncorrelated_inputs_at_their_nearest_values():
    weight, h = random_weight(8, 32, 4), torch.diag(torch.rand(32) + 0.1)
    scheme = WeightScheme(bits=3, group_size=16, scale_dtype="float32")
    scale = torch.full((8, 2), float(weight.abs().max()) / 3.5)
    q = compensate(weight.flip(0).contiguous(), h, scale, None, scheme)  # begin somewhere else
    found = descend(weight, h, q, passes=1, block_size=7)
    assert torch.equal(found.codes, encode(weight, scale, None, scheme))


@pytest.mark.parametrize("kind", INCOHERENT)
@pytest.mark.parametrize("bits", [2, 3])
def test_planted_outliers_cost_quip_less_than_ldlq_alone(kind, bits):
    weight, h = random_weight(64, 96, 7), moment(96, 400)
    weight[::5, ::13] *= 15
    losses = []
    for method in (QuIP(bits=bits, matrices=kind), QuIP(bits=bits, incoherence=False)):
        q = method.solve(weight, method.weights({"x": 96}), {"second_moment": h})
        losses.append(proxy_loss(weight, q.dequantize(), h))
    assert losses[0] < 0.5 * losses[1]


def test_a_weight_of_zeros_stays_small():
    method = QuIP()
    q = method.solve(torch.zeros(6, 32), method.weights({"x": 32}), {"second_moment": torch.eye(32)})
    assert q.dequantize().abs().max() < 1e-6


def test_what_is_stored_reads_back_as_it_was_kept(tmp_path):
    job = job_for(InMemory(random_model("untied")), [QuIP(bits=2, matrices="hadamard")], windows("untied"))
    run = carry_out(job, tmp_path / "out")
    kept = model_in_memory(run.place.stored(run.job))
    read = load_packed(Decoded(run.folder), torch.float32)
    with torch.no_grad():
        assert torch.equal(kept(windows("untied")).logits, read(windows("untied")).logits)
    name = "model.layers.0.mlp.up_proj"
    stored = run.place.stored(run.job)
    assert torch.equal(stored.rows(f"{name}.weight", 2, 5), stored.tensor(f"{name}.weight")[2:5])
    assert Decoded.only_read_here(run.folder)
    assert Decoded(run.folder).scheme(name) == run.job.plan.linears[name].scheme


def test_zeros_of_an_earlier_step_are_refused():
    steps = Recipe.parse(["wanda", "quip"]).steps
    with pytest.raises(RecipeError, match=r"quip after wanda: it stores \S+ in another basis"):
        make_plan(steps, InMemory(random_model("tied")))
