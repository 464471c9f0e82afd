"""Which tokens the next step computes: continuous batching with chunked prefill, preemption and resumption.

After Yu et al., "Orca", OSDI 2022 (a batch is put together anew for every step), Kwon et al., "Efficient Memory
Management for Large Language Model Serving with PagedAttention", SOSP 2023 (paged cache, preemption), and Agrawal et
al., "Sarathi-Serve", OSDI 2024 (prompts in chunks beside answers). What a step holds never changes an answer.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from frugallm.engine.blocks import Blocks, Copy
from frugallm.engine.request import Sequence


@dataclass
class Step:
    """What to compute: so many tokens of each of these sequences, after copying these blocks."""

    parts: list[tuple[Sequence, int]] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)


class Scheduler:
    """Who waits and who runs.

    Parameters
    ----------
    blocks
        The cache's blocks.
    most_tokens, most_sequences
        Limits of one step.
    """

    def __init__(self, blocks: Blocks, most_tokens: int, most_sequences: int) -> None:
        self.blocks = blocks
        self.most_tokens, self.most_sequences = most_tokens, most_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def run(self, sequence: Sequence) -> None:
        """Let a sequence run that has its blocks already."""
        insort(self.running, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.table)

    def schedule(self) -> Step:
        """Choose the tokens of the next step and give them blocks."""
        step, before = Step(), self.preemptions
        left = self._go_on(step)
        if self.preemptions == before:  # nobody comes in while somebody is sent out
            self._admit(step, left)
        return step

    def preempt(self, sequence: Sequence) -> None:
        """Free the blocks of a running sequence; it computes them again, or finds them still known, later."""
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _go_on(self, step: Step) -> int:
        """Schedule what runs, first come, first served; return how many tokens the step still has room for."""
        left = self.most_tokens
        answering = sum(sequence.need == 1 for sequence in self.running)
        for sequence in tuple(self.running):
            answering -= sequence.need == 1
            # A long prompt leaves a place for everybody who waits for the next token.
            count = min(sequence.need, left - answering) if sequence.need > 1 else min(1, left)
            if count > 0 and sequence in self.running and self._make_room(sequence, count, step):
                left -= count
        return left

    def _make_room(self, sequence: Sequence, count: int, step: Step) -> bool:
        """Give blocks to a sequence, preempting later ones; false where it had to go itself."""
        while True:
            copies = self.blocks.extend(sequence.table, sequence.computed, sequence.computed + count)
            if copies is not None:
                step.parts.append((sequence, count))
                step.copies += copies
                return True
            last = self.running[-1]  # not yet part of the step, for it comes last
            self.preempt(last)
            if last is sequence:
                return False

    def _admit(self, step: Step, left: int) -> None:
        """Let in who waits while there is room for the whole text and a block more for everybody who runs."""
        while self.waiting and left > 0:
            first = self.waiting[0]
            if len(self.running) + 1 + len(first.siblings) > self.most_sequences:
                return
            size = self.blocks.size
            # At least one token is computed, for its logits are wanted.
            first.table = self.blocks.take_prefix(first.digests(size, len(first.tokens) - 1))
            first.computed = len(first.table) * size
            wanted = self.blocks.needed(len(first.tokens)) - len(first.table)
            if wanted + len(self.running) > self.blocks.free and self.running:
                self.blocks.release(first.table)
                first.computed = 0
                return
            self.waiting.popleft()
            self.run(first)
            count = min(first.need, left)
            if not self._make_room(first, count, step):
                return
            left -= count
