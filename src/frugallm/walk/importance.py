"""The importance of input channels: the mean square of what each linear reads, over a calibration text."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from frugallm.compress.plan import Plan
from frugallm.evaluate.precision import fast_dtype
from frugallm.models.checkpoint import Checkpoint
from frugallm.progress import Progress
from frugallm.walk.walk import Walk

NEEDS = frozenset({"mean_square"})


def channel_importance(
    checkpoint: Checkpoint, windows: Tensor, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Pass calibration windows through a model, block by block, and look at the inputs of its linears.

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
    nothing = Plan(rewrites=(), linears={}, tables={}, left_alone=())
    found: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory(prefix="frugal-importance-") as scratch:
        walk = Walk(checkpoint, nothing, windows, Path(scratch), fast=fast_dtype())
        table = f"{checkpoint.family.embedding}.weight"
        walk.embed(lambda start, stop: checkpoint.rows(table, start, stop))
        for index in range(len(walk)):
            state = checkpoint.block_state(index)
            block = walk.load(index, state)
            statistics = walk.observe(block, NEEDS)
            for site in block.sites:
                for path in site.linears:
                    found[f"{block.full_name(path)}.weight"] = statistics[site.name]["mean_square"]
            if index + 1 < len(walk):  # nobody reads what the last block gives
                walk.replay(index, state, lambda _: {})
            if progress is not None:
                progress.event("block", index=index + 1, of=len(walk))
    return found
