"""What the linears of a model read, over a calibration text: statistics of every channel, gathered in one walk.

The mean square of a channel is its importance: what an error of the weights that read it costs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from frugallm.compress.plan import Plan
from frugallm.evaluate.precision import fast_dtype
from frugallm.models.checkpoint import Checkpoint
from frugallm.progress import Progress
from frugallm.walk.hidden import HIDDEN_LIMIT
from frugallm.walk.statistics import Statistics
from frugallm.walk.walk import Walk

SHARE = "share"


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
        Names of statistics. They are kept for all linears at once: those with one number a channel. ``"share"`` is one
        more, a single number: how much of the stream the linear's sublayer makes (:meth:`Walk.shares`).
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
        statistics = walk.observe(block, needs - {SHARE})
        if SHARE in needs:
            for name, share in walk.shares(block).items():
                statistics[name][SHARE] = torch.tensor(share, dtype=torch.float64)
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
