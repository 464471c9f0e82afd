"""Blocks of the cache: who holds them, which hold a known prefix, and which are given up first.

A block is *held* by one or more sequences or *free*. A full block is registered under a hash of all tokens up to its
end. A free block keeps its content and its hash until it is needed, so that the next prompt with the same beginning
finds it; the block that has been free for longest goes first.

Shared blocks are never written: full ones because no token comes to them any more, a partly filled one because whoever
writes first gets a copy.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from frugallm.errors import JobError

ROOT = b""  # hash of the empty prefix


def chain(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Return the hash of a prefix that goes on with the tokens of one block; 128 bits, so that equal means same."""
    return hashlib.blake2b(previous + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Copy:
    """What the runner must copy before the step: the content of one block to another."""

    source: int
    target: int


class Blocks:
    """All blocks of one cache. Tables of sequences are plain lists of block numbers, kept by the sequences.

    Parameters
    ----------
    count, size
        How many blocks, and the tokens in one.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._holders = [0] * count
        self._hash: list[bytes | None] = [None] * count
        self._known: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # longest free first

    @property
    def free(self) -> int:
        """Blocks that nobody holds, those with a known prefix included."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Return how many blocks hold so many tokens."""
        return -(-tokens // self.size)

    def take_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """Take the known blocks of a prefix, up to the first unknown one.

        Parameters
        ----------
        digests
            Hashes of the prefix at the end of each of its blocks (:func:`chain`).
        """
        table: list[int] = []
        for digest in digests:
            if digest not in self._known:
                break
            table.append(self._known[digest])
            self._hold(table[-1])
        return table

    def extend(self, table: list[int], start: int, stop: int) -> list[Copy] | None:
        """Make positions ``start`` to ``stop`` of a sequence writable, or change nothing and return ``None``.

        Parameters
        ----------
        table
            The sequence's blocks; new ones are appended, a shared one that will be written is replaced.
        start, stop
            Positions that the step will write.

        Returns
        -------
        list of Copy or None
            What has to be copied before the step; ``None`` where too few blocks are free.
        """
        first = start // self.size
        shared = [i for i in range(first, len(table)) if self._holders[table[i]] > 1]
        missing = max(0, self.needed(stop) - len(table))
        if len(shared) + missing > self.free:
            return None
        copies = []
        for i in shared:
            copies.append(Copy(table[i], self._new()))
            self._holders[table[i]] -= 1
            table[i] = copies[-1].target
        table.extend(self._new() for _ in range(missing))
        return copies

    def fork(self, table: Sequence[int]) -> list[int]:
        """Return a second table of the same blocks, held once more."""
        for block in table:
            self._hold(block)
        return list(table)

    def register(self, block: int, digest: bytes) -> None:
        """Make a full block, computed and held, known under the hash of its prefix.

        Where two sequences computed the same at the same time, the first block is the known one and both stay.
        """
        if self._hash[block] is None and digest not in self._known:
            self._hash[block] = digest
            self._known[digest] = block

    def release(self, table: list[int]) -> None:
        """Let go of all blocks of a sequence and empty its table; ends of prefixes are given up before beginnings."""
        while table:
            block = table.pop()
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None

    def forget(self) -> None:
        """Forget all known prefixes."""
        self._known.clear()
        self._hash = [None] * self.count

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Check that every block is where it should be, given the tables of all sequences.

        Raises
        ------
        JobError
            If a block is lost, held by nobody who knows, or known under another's hash.
        """
        held = Counter(block for table in tables for block in table)
        for block in range(self.count):
            if self._holders[block] != held[block]:
                raise JobError(
                    f"block {block} has {self._holders[block]} holders, {held[block]} tables name it"
                )
            if (block in self._free) != (held[block] == 0):
                raise JobError(f"block {block} has {held[block]} holders and is free: {block in self._free}")
        registered = {digest: block for block, digest in enumerate(self._hash) if digest is not None}
        if registered != self._known:
            raise JobError("known prefixes and the hashes of blocks differ")

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._holders[block] += 1

    def _new(self) -> int:
        block, _ = self._free.popitem(last=False)
        digest = self._hash[block]
        if digest is not None:
            del self._known[digest]
            self._hash[block] = None
        self._holders[block] = 1
        return block
