"""What solvers and rewrites must do, as functions of plain tensors and of one decoder block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod
from frugallm.compress.plan import Plan
from frugallm.compress.prune.unstructured.masks import Sparsity
from frugallm.compress.quantize.grids import nearest_on, round_to_nearest
from frugallm.compress.quantize.solvers import proxy_loss
from frugallm.conformance.outcome import ensure
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.open import dense_model
from frugallm.walk.statistics import Gather
from frugallm.walk.walk import Walk

Solve = Callable[[Tensor, WeightScheme, Mapping[str, Tensor]], QuantizedTensor]
Prune = Callable[[Tensor, Mapping[str, Tensor]], Tensor]

#: Rows of weights that solvers are tried on.
ROWS = (1, 7, 65)
#: Share of codes that may differ where only the order of float sums does.
SHARE_OF_TIES = 2e-3
#: Largest change of logits by a rewrite, relative to the largest logit.
REWRITE_TOLERANCE = 1e-4


def example(rows: int, width: int, needs: frozenset[str], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a weight ``(rows, width)`` and statistics of correlated, uneven inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * (0.1 + torch.rand(width, generator=generator) ** 4)
    inputs = torch.randn(8 * width, width, generator=generator) @ mix
    weight = torch.randn(rows, width, generator=generator) * 0.1
    gather = Gather(needs, width)
    moved = inputs + 0.1 * torch.randn(inputs.shape, generator=generator) * inputs.std(0)
    gather.add(inputs, moved)
    return weight, dict(gather.values())


def solver_leaves_its_inputs_alone(
    solve: Solve, scheme: WeightScheme, width: int, needs: frozenset[str]
) -> None:
    """Weight and statistics are the same afterwards, and the codes lie on the grid."""
    for rows in ROWS:
        weight, statistics = example(rows, width, needs)
        before = weight.clone(), {name: value.clone() for name, value in statistics.items()}
        q = solve(weight, scheme, statistics)
        same = torch.equal(weight, before[0]) and all(
            torch.equal(statistics[n], v) for n, v in before[1].items()
        )
        ensure(same, "solve changes its weight or its statistics")
        low, high = scheme.code_range
        fits = q.codes.shape == weight.shape and q.codes.dtype == torch.int8
        inside = fits and int(q.codes.min()) >= low and int(q.codes.max()) <= high
        ensure(inside, f"codes of {rows} rows leave the grid")
        ensure(q.scale.shape == (rows, width // scheme.columns_per_scale(width)), "scales have another shape")
        ensure(str(q.scale.dtype) == f"torch.{scheme.scale_dtype}", "scales are not of the stored type")
        ensure(
            (q.zero is None) == scheme.symmetric,
            "zero points are there if and only if the grid is asymmetric",
        )


def solver_treats_rows_alike(solve: Solve, scheme: WeightScheme, width: int, needs: frozenset[str]) -> None:
    """Rows in another order give the same codes in that order, and so does a row alone."""
    weight, statistics = example(ROWS[-1], width, needs)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))
    codes = solve(weight, scheme, statistics).codes
    permuted = solve(weight[order], scheme, statistics).codes
    differ = (permuted != codes[order]).float().mean().item()
    ensure(differ <= SHARE_OF_TIES, f"{differ:.1%} of codes depend on the order of rows")
    alone = torch.cat([solve(weight[i : i + 1], scheme, statistics).codes for i in range(3)])
    differ = (alone != codes[:3]).float().mean().item()
    ensure(differ <= SHARE_OF_TIES, f"{differ:.1%} of codes depend on the other rows")


def solver_is_no_worse_than_nearest(
    solve: Solve, scheme: WeightScheme, width: int, needs: frozenset[str], *, prunes: bool
) -> None:
    """On its own grid, and with its own zeros if it prunes, the output's squared error is at most that of nearest.

    What stores more than codes may have its grid in another basis; then nearest is that on plain ranges.
    """
    for seed in range(3):
        weight, statistics = example(16, width, needs, seed)
        h = statistics["second_moment"]
        q = solve(weight, scheme, statistics)
        kept = weight.masked_fill(q.dequantize() == 0, 0.0) if prunes else weight
        nearest = round_to_nearest(kept, scheme) if q.extras else nearest_on(q, kept)
        ours, plain = (proxy_loss(weight, one.dequantize(), h) for one in (q, nearest))
        ensure(ours <= plain * (1 + 1e-5), f"output error {ours:.4g}, rounding to nearest has {plain:.4g}")


def solver_keeps_zeros(solve: Solve, scheme: WeightScheme, width: int, needs: frozenset[str]) -> None:
    """Told which entries are pruned, a solver loses nothing when they are made zero again afterwards."""
    weight, statistics = example(ROWS[-1], width, needs)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    weight = weight.masked_fill(pruned, 0.0)
    q = solve(weight, scheme, {**statistics, "pruned": pruned})
    ensure(not q.dequantize()[pruned].any(), "pruned weights are stored as something else than zero")
    ensure(torch.equal(q.with_zeros(pruned).codes, q.codes), "the codes of zero are not those of the grid")


def repair_comes_closer(step: BlockMethod, width: int) -> None:
    """Extras are of the kinds announced, codes stay, and the error falls: of the output if its inputs are known."""
    scheme = WeightScheme(bits=3, extras=step.adds)
    weight, statistics = example(ROWS[-1], width, step.repair_needs)
    stored = round_to_nearest(weight, scheme)
    repaired = step.repair(weight, stored, statistics)
    kinds = tuple(extra.kind for extra in repaired.extras)
    ensure(kinds == step.adds, f"it announces {step.adds} and adds {kinds}")
    ensure(torch.equal(repaired.codes, stored.codes), "it changes codes")
    h = statistics.get("second_moment", torch.eye(width))
    before, after = (proxy_loss(weight, one.dequantize(), h) for one in (stored, repaired))
    ensure(after < before, f"the squared error is {after:.4g}, without it {before:.4g}")
    part = repaired.rows(3, 9).dequantize()
    ensure(torch.allclose(part, repaired.dequantize()[3:9], atol=1e-5), "its rows are not rows of it")


def pruner_zeroes_what_it_says(
    prune: Prune, sparsity: Sparsity, width: int, needs: frozenset[str], *, by_rows: bool
) -> None:
    """Weight and statistics are the same afterwards; the zeros are as many as claimed, and lie where the pattern says."""
    for rows in ROWS:
        weight, statistics = example(rows, width, needs)
        before = weight.clone(), {name: value.clone() for name, value in statistics.items()}
        value = prune(weight, statistics)
        same = torch.equal(weight, before[0]) and all(
            torch.equal(statistics[n], v) for n, v in before[1].items()
        )
        ensure(same, "prune changes its weight or its statistics")
        fits = value.shape == weight.shape and value.dtype == torch.float32 and bool(value.isfinite().all())
        ensure(fits, f"{rows} rows come back as {tuple(value.shape)} {value.dtype}, or not finite")
        ensure_zeros(value, sparsity, f"a weight of {rows} rows", by_rows=by_rows)


def ensure_zeros(
    value: Tensor, sparsity: Sparsity, what: str, *, by_rows: bool, rounded: bool = False
) -> None:
    """Fail unless the claimed share of ``value (out, in)`` is zero, within each row or each group of ``n:m``.

    The share is exact, unless weights were ``rounded`` since: that may make more of them zero.
    """
    zeros = value == 0
    size = sparsity.group or (zeros.shape[1] if by_rows else zeros.numel())
    counts, wanted = zeros.reshape(-1, size).sum(-1), sparsity.count(size)
    # Whoever compares all rows may do so by blocks of columns, and half an entry may be missing in each.
    slack = 0 if sparsity.group or by_rows else 1 + zeros.shape[1] // 128
    enough = bool((counts >= wanted - slack).all())
    good = enough and (rounded or bool((counts <= wanted + slack).all()))
    ensure(good, f"{what}: {int(counts.min())} to {int(counts.max())} zeros of {size}, claimed are {wanted}")


def pruner_treats_rows_alike(prune: Prune, width: int, needs: frozenset[str]) -> None:
    """Rows in another order give the same values in that order, and so does a row alone."""
    weight, statistics = example(ROWS[-1], width, needs)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))
    value = prune(weight, statistics)
    differ = ((prune(weight[order], statistics) == 0) != (value[order] == 0)).float().mean().item()
    ensure(differ <= SHARE_OF_TIES, f"{differ:.1%} of the zeros depend on the order of rows")
    alone = torch.cat([prune(weight[i : i + 1], statistics) for i in range(3)])
    differ = ((alone == 0) != (value[:3] == 0)).float().mean().item()
    ensure(differ <= SHARE_OF_TIES, f"{differ:.1%} of the zeros depend on the other rows")


def pruner_is_no_worse_than_its_zeros(prune: Prune, width: int, needs: frozenset[str]) -> None:
    """The output's squared error is at most that of the same zeros with every other weight as it was."""
    for seed in range(3):
        weight, statistics = example(16, width, needs, seed)
        h = statistics["second_moment"]
        value = prune(weight, statistics)
        ours, plain = (proxy_loss(weight, one, h) for one in (value, weight.masked_fill(value == 0, 0.0)))
        ensure(ours <= plain * (1 + 1e-5), f"output error {ours:.4g}, its zeros alone have {plain:.4g}")


class Nearest(BlockMethod):
    """Rounds to nearest: stands for whatever rounds a weight that an earlier step has pruned."""

    solves: ClassVar[Literal["step", "default", "no"]] = "step"

    bits: int = Field(3, ge=2, le=8, description="bits per weight")

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return one scale a row."""
        return WeightScheme(bits=self.bits)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)``."""
        return round_to_nearest(weight, scheme)


def rewritten_blocks(step: BlockMethod, walk: Walk) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield index and state of every block as ``step`` rewrites it, nothing rounded."""
    table = f"{walk.family.embedding}.weight"
    walk.embed(lambda start, stop: walk.checkpoint.rows(table, start, stop))
    for index in range(len(walk)):
        block = walk.load(index)
        step.rewrite(block, walk.observe(block, step.rewrite_needs))
        state = {name: tensor.clone() for name, tensor in block.state.items()}
        yield index, state
        walk.replay(index, state, lambda _: {})


def rewrite_keeps_the_logits(
    step: BlockMethod, checkpoint: Checkpoint, tokens: Tensor, scratch: Path
) -> None:
    """The model with every block rewritten computes the same logits in float32."""
    model = dense_model(checkpoint, torch.float32)
    rewritten = copy.deepcopy(model)
    nothing = Plan(rewrites=(step,), linears={}, tables={}, left_alone=())
    walk = Walk(checkpoint, nothing, tokens, scratch, fast=torch.float32, stored=torch.float32)
    changed = False
    for index, state in rewritten_blocks(step, walk):
        block = rewritten.get_submodule(checkpoint.family.block(index))
        changed |= any(not torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())
        block.load_state_dict(state)
    with torch.inference_mode():
        before, after = model(tokens).logits, rewritten(tokens).logits
    error = float((after - before).abs().max() / before.abs().max())
    ensure(error <= REWRITE_TOLERANCE, f"logits move by {error:.1e} of the largest")
    ensure(changed, "nothing is rewritten")
