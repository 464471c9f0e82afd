import pytest
import torch

from frugallm.compress.plan import Plan
from frugallm.compress.quantize import transforms
from frugallm.conformance.trial import KINDS, random_model, windows
from frugallm.models.in_memory import InMemory
from frugallm.walk.walk import Walk

NOTHING = Plan(rewrites=(), linears={}, tables={}, left_alone=())


def first_block(kind, tmp_path):
    checkpoint = InMemory(random_model(kind))
    walk = Walk(checkpoint, NOTHING, windows(kind), tmp_path, fast=torch.float32, stored=torch.float32)
    walk.embed(lambda start, stop: checkpoint.rows("model.embed_tokens.weight", start, stop))
    return walk, walk.load(0)


def output(walk, block):
    with torch.no_grad():
        return walk.calls[block.index](block.module, walk.hidden.values.clone())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(4))
def test_a_scaled_site_leaves_the_function_and_changes_the_input(kind, number, tmp_path):
    walk, block = first_block(kind, tmp_path)
    site = block.sites[number]
    before = output(walk, block)
    largest = walk.observe(block, frozenset({"absmax"}))[site.name]["absmax"]
    scale = (
        torch.rand(block.weight(site.name).shape[1], generator=torch.Generator().manual_seed(1)) * 4 + 0.25
    )
    block.scale_site(site, scale)
    after = output(walk, block)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    ratio = largest / walk.observe(block, frozenset({"absmax"}))[site.name]["absmax"]
    if site.writer_kind != "heads":
        torch.testing.assert_close(ratio, scale, rtol=1e-4, atol=0)
    else:  # one scale for all query heads of a value head: the geometric mean over them
        head_dim = block.heads.width
        repeats = block.heads.repeats
        assert repeats > 1
        heads = ratio.view(block.heads.values, repeats, head_dim)
        torch.testing.assert_close(heads, heads[:, :1].expand_as(heads), rtol=1e-4, atol=0)
        wanted = scale.view(block.heads.values, repeats, head_dim).log().mean(1).exp()
        torch.testing.assert_close(heads[:, 0], wanted, rtol=1e-4, atol=0)


def test_a_tied_scale_is_its_own_mean():
    scale = torch.rand(6 * 4) + 0.5
    tied = transforms.tie_over_group(scale, head_dim=4, repeats=3)
    assert tied.shape == (2 * 4,)
    spread = transforms.repeat_over_group(tied, head_dim=4, repeats=3)
    torch.testing.assert_close(transforms.tie_over_group(spread, 4, 3), tied)
    assert torch.equal(spread[:4], spread[4:8]) and torch.equal(spread[:4], tied[:4])


def test_scaling_rows_undoes_scaling_columns():
    weight, bias, scale = torch.randn(5, 7), torch.randn(5), torch.rand(5) + 0.5
    x = torch.randn(3, 7)
    reader = torch.randn(2, 5)
    plain = (x @ weight.T + bias) @ reader.T
    moved = (x @ transforms.scale_rows(weight, scale).T + transforms.scale_rows(bias, scale)) @ (
        transforms.scale_columns(reader, scale).T
    )
    torch.testing.assert_close(moved, plain)


def test_a_folded_gain_is_all_ones_and_the_function_stays():
    gain, weights, x = torch.rand(6) + 0.5, [torch.randn(3, 6), torch.randn(4, 6)], torch.randn(2, 6)
    ones, folded = transforms.fold_gain(gain, weights)
    assert torch.equal(ones, torch.ones(6))
    for before, after in zip(weights, folded):
        torch.testing.assert_close((x * ones) @ after.T, (x * gain) @ before.T)
