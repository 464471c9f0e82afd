"""What the linears of a model read, over a calibration text: statistics of every channel, gathered in one walk.

The mean square of a channel is its importance: what an error of the weights that read it costs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from frugallm.compress.contract import GROUP_SIZES
from frugallm.compress.plan import Plan
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.solvers import output_energy
from frugallm.evaluate.precision import fast_dtype
from frugallm.formats.quantized_tensor import WeightScheme
from frugallm.models.checkpoint import Checkpoint
from frugallm.progress import Progress
from frugallm.walk.block import Block
from frugallm.walk.hidden import HIDDEN_LIMIT
from frugallm.walk.statistics import Statistics
from frugallm.walk.walk import Walk

#: Beside the names of :mod:`frugallm.walk.statistics`: what an error of the linears at a site does to the block's output.
GAIN = "gain"
_TRIED_BITS = 4


def channel_importance(
    checkpoint: Checkpoint, windows: Tensor, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Return the mean square of every channel that a linear reads.

    Parameters
    ----------
    checkpoint
        The model; one block at a time is in memory.
    windows
        ``(windows, length)`` token ids.

    Returns
    -------
    dict
        Full name of each linear's weight to the mean squares ``(in,)`` float32 of its input.
    """
    with tempfile.TemporaryDirectory(prefix="frugal-importance-") as scratch:
        needs = frozenset({"mean_square"})
        found = input_statistics(
            checkpoint, windows, needs, Path(scratch), fast=fast_dtype(), progress=progress
        )
    return {f"{name}.weight": statistics["mean_square"] for name, statistics in found.items()}


def input_statistics(
    checkpoint: Checkpoint,
    windows: Tensor,
    needs: frozenset[str],
    scratch: Path,
    *,
    fast: torch.dtype,
    hidden_limit: int = HIDDEN_LIMIT,
    progress: Progress | None = None,
    event: str = "block",
) -> dict[str, Statistics]:
    """Pass calibration windows through a model as it is, block by block, and look at the inputs of its linears.

    Parameters
    ----------
    needs
        Names of statistics. They are kept for all linears at once: those with one number a channel, and ``"gain"``, a
        single number (:func:`gains`).
    scratch
        Folder for hidden states that do not fit ``hidden_limit`` bytes.
    fast
        Type of products.
    event
        What to call a block in reports of progress.

    Returns
    -------
    dict
        Full name of each linear to the statistics of its input; linears that share it share them.
    """
    nothing = Plan(rewrites=(), linears={}, tables={}, left_alone=())
    found: dict[str, Statistics] = {}
    walk = Walk(checkpoint, nothing, windows, scratch, fast=fast, hidden_limit=hidden_limit)
    table = f"{checkpoint.family.embedding}.weight"
    walk.embed(lambda start, stop: checkpoint.rows(table, start, stop))
    for index in range(len(walk)):
        state = checkpoint.block_state(index)
        block = walk.load(index, state)
        statistics = walk.observe(block, needs - {GAIN} | ({"mean_square"} if GAIN in needs else set()))
        if GAIN in needs:
            for name, gain in gains(walk, block, statistics).items():
                statistics[name][GAIN] = torch.tensor(gain, dtype=torch.float64)
        for site in block.sites:
            for path in site.linears:
                found[block.full_name(path)] = statistics[site.name]
        if index + 1 < len(walk):  # nobody reads what the last block gives
            walk.replay(index, state, lambda _: {})
        if progress is not None:
            progress.event(event, index=index + 1, of=len(walk))
    if walk.hidden is not None:
        walk.hidden.close()
    return found


def gains(walk: Walk, block: Block, statistics: Mapping[str, Statistics]) -> dict[str, float]:
    """Return, by site, how much of an error of its linears' outputs is found behind the block.

    The linears that read an input are rounded to nearest in 4 bits. The gain is the squared change of a token's state
    behind the block, relative to that state, by the squared error of the outputs, relative to these. Errors are small
    enough for the one to grow as the other does, so the gain holds for any number of bits. The last linears of experts
    are rounded together and have one gain, by the sum of their errors.

    Parameters
    ----------
    statistics
        By site; of them the mean squares.
    """
    together = [sites for sub in block.graph for sites in ((sub.reads,), sub.outputs)]
    variants: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, float] = {}
    for sites in together:
        name, error = sites[0].name, 0.0
        variants[name] = {}
        for site in sites:
            lost = size = 0.0
            for path in site.linears:
                weight, square = block.weight(path), statistics[site.name]["mean_square"]
                group = next((g for g in GROUP_SIZES if weight.shape[1] % g == 0), None)
                rounded = round_to_nearest(
                    weight, WeightScheme(bits=_TRIED_BITS, group_size=group)
                ).dequantize()
                lost += output_energy(rounded - weight, square)
                size += output_energy(weight, square)
                variants[name][path] = rounded
            error += lost / max(size, 1e-30)
        errors[name] = max(error, 1e-30)
    effects = walk.effects(block, variants)
    return {site.name: effects[sites[0].name] / errors[sites[0].name] for sites in together for site in sites}
