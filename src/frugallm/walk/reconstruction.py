"""What a step that trains a stored block is given: the block, the original of it, and what both read.

The walk makes one :class:`Reconstruction` for a block whose linears are solved and hands it to the steps that ask for it.
Only this one block is ever trained, so only its gradients and its optimizer's state are in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from frugallm.formats.quantized_tensor import QuantizedTensor
from frugallm.walk.block import Block
from frugallm.walk.facts import weight_error
from frugallm.walk.forward import Call
from frugallm.walk.hidden import HiddenStates
from frugallm.walk.solved import SolvedBlock

if TYPE_CHECKING:
    from frugallm.compress.contract import BlockMethod
    from frugallm.walk.walk import Walk

#: Which hidden states block and original read: both those of the model as stored, both those of the original model, or
#: each its own.
Streams = Literal["stored", "original", "own"]

HELD_OUT_SHARE, HELD_OUT_MOST = 8, 8


@dataclass(frozen=True)
class Reconstruction:
    """A block that is stored, and what it should compute.

    Attributes
    ----------
    block
        The block with its stored values, which rounds inputs as it will at run time; gradients pass straight through.
    target
        The same block of the original model, behind what rewrites it: it computes the original's function.
    weights
        What was to be rounded, ``(out, in)`` float32 by the linear's path.
    linears
        What it is stored as so far, by path; only the linears that the step touches.
    frozen
        Where codes must stay as they are, bool ``(out, in)`` by path: entries that were pruned.
    stored, original
        Inputs of the block in the model as stored, and in the original model; ``None`` unless the step asked for them.
    call
        What the model hands to the block beside hidden states.
    seed
        For whatever is drawn at random: another for every block.
    """

    block: Block
    target: Block
    weights: Mapping[str, Tensor]
    linears: Mapping[str, QuantizedTensor]
    frozen: Mapping[str, Tensor]
    stored: HiddenStates
    original: HiddenStates | None
    call: Call
    seed: int

    def windows(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of the windows to train on, and of those held out to judge by.

        One of eight is held out, at most eight windows, spread over the text. A single window serves for both.
        """
        every = torch.arange(self.stored.values.shape[0])
        count = min(HELD_OUT_MOST, len(every) // HELD_OUT_SHARE) or min(1, len(every) - 1)
        if not count:
            return every, every
        held = torch.linspace(0, len(every) - 1, count).round().long()
        rest = torch.ones(len(every), dtype=torch.bool)
        rest[held] = False
        return every[rest], held

    def inputs(self, streams: Streams, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return what block and original read of these windows, ``(windows, length, width)`` each."""
        stored = self.stored.values[windows]
        if streams == "stored":
            return stored, stored
        assert self.original is not None
        original = self.original.values[windows]
        return (original if streams == "original" else stored), original

    def outputs(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return what the block makes of ``x`` with these weights ``(out, in)`` by path in the place of its own.

        Gradients flow to the weights.
        """
        named = {f"{path}.weight": weight for path, weight in weights.items()}
        out = functional_call(self.block.module, named, (x, *self.call.args), self.call.kwargs)
        return (out[0] if isinstance(out, tuple) else out).float()

    def targets(self, x: Tensor) -> Tensor:
        """Return what the original block makes of ``x``."""
        with torch.no_grad():
            return self.call(self.target.module, x).float()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Let products run in their fast type, and gradients be kept."""
        fast = self.block.fast
        with torch.enable_grad(), torch.autocast("cpu", fast, enabled=fast is not torch.float32):
            yield


@dataclass(frozen=True)
class Reconstructed:
    """What a step has made of a block.

    Attributes
    ----------
    linears
        Stored forms by path, those that it has changed.
    before, after
        The error of the block's outputs on the held-out windows.
    """

    linears: Mapping[str, QuantizedTensor]
    before: float
    after: float


def reconstruct(
    walk: Walk,
    done: SolvedBlock,
    steps: Sequence[BlockMethod],
    before: Mapping[str, Tensor],
    inputs: HiddenStates,
) -> None:
    """Let ``steps`` train a solved block.

    Parameters
    ----------
    before
        The block's tensors as the solvers saw them, by name.
    inputs
        Hidden states in front of it in the model as stored.
    """
    started, block = time.perf_counter(), done.block
    assert done.reference is not None
    for step in steps:
        mine = {p: q for p, q in done.linears.items() if step.touches(block.full_name(p))}
        pruned = [p for p in mine if block.full_name(p) in walk.plan.pruned]
        task = Reconstruction(
            block=block,
            target=done.reference,
            weights={p: before[f"{p}.weight"] for p in mine},
            linears=mine,
            frozen={p: mine[p].dequantize() == 0 for p in pruned},
            stored=inputs,
            original=walk.original,
            call=walk.calls[block.index],
            seed=walk.seed + block.index,
        )
        result = step.reconstruct(task)
        for path, q in result.linears.items():
            done.linears[path] = q
            block.set_weight(path, q.dequantize())
        for facts in done.layers:
            _correct(facts, step.name(), result, before, block)
    done.seconds["reconstruct"] = time.perf_counter() - started


def _correct(
    facts: dict[str, Any], step: str, result: Reconstructed, before: Mapping[str, Tensor], block: Block
) -> None:
    """Bring the facts of one linear up to date; the error of its own output is not known anymore."""
    path = next((p for p in result.linears if block.full_name(p) == facts["name"]), None)
    if path is None:
        return
    if step not in facts["step"].split():
        facts["step"] += f" {step}"
    facts["weight_error"] = weight_error(before[f"{path}.weight"], block.weight(path))
    facts |= {"block_error": result.after, "block_error_before": result.before}
    facts.pop("error", None)
    facts.pop("baseline_error", None)
