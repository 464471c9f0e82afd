"""The seam between the engine and what computes a model: one step of many sequences over a paged cache."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

#: Tokens in a block of the cache.
BLOCK_SIZE = 16


class Runner(Protocol):
    """A loaded model with a cache of keys and values in blocks.

    A runner owns weights and cache and knows nothing of requests. What it returns for a token depends on the tokens of
    that sequence up to it and on nothing else, to the last bit: not on other sequences of the step, not on how many of
    the sequence's tokens one step holds, not on which blocks the cache lies in. Everything that the engine promises
    about batching, chunks, preemption and shared prefixes rests on this.

    Attributes
    ----------
    block_size
        Tokens in a block of the cache.
    """

    block_size: int

    def step(
        self, tokens: Tensor, positions: Tensor, starts: Tensor, tables: Tensor, logits_rows: Tensor
    ) -> Tensor:
        """Compute the tokens of one step, sequence after sequence, and put their keys and values into the cache.

        The keys and values of a token of sequence ``s`` at position ``p`` go to block ``tables[s, p // block_size]``, slot
        ``p % block_size``; all tokens of the step are written before any of them attends, and each attends to positions
        ``0`` to ``p`` of its sequence.

        Parameters
        ----------
        tokens, positions
            int32 ``(T,)``: the tokens of all sequences, and where in its sequence each stands; ascending by one within a
            sequence.
        starts
            int32 ``(S + 1,)``: where each sequence's tokens begin; the last is ``T``.
        tables
            int32 ``(S, B)``: cache blocks of each sequence, ``-1`` where it has none.
        logits_rows
            int32 ``(R,)``: the rows of ``tokens`` whose logits are wanted.

        Returns
        -------
        Tensor
            Logits, float32 ``(R, vocabulary)``.
        """
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy keys and values of block ``source`` to block ``target``, all layers."""
        ...
