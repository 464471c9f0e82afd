"""Blocks of the cache: sharing, copy on write, who is given up first, and that none is ever lost."""

import random

import pytest

from frugallm.engine.blocks import ROOT, Blocks, Copy, chain
from frugallm.errors import JobError


def digests(tokens, size):
    found, last = [], ROOT
    for start in range(0, len(tokens) - size + 1, size):
        last = chain(last, tokens[start : start + size])
        found.append(last)
    return found


def filled(blocks, tokens):
    """A sequence whose tokens are all computed."""
    table = []
    assert blocks.extend(table, 0, len(tokens)) == []
    for block, digest in zip(table, digests(tokens, blocks.size)):
        blocks.register(block, digest)
    return table


def test_a_hash_speaks_for_everything_before_it():
    assert digests([1, 2, 3, 4], 2)[1] != digests([9, 2, 3, 4], 2)[1]
    assert digests([1, 2, 3, 4], 2)[0] == digests([1, 2, 9, 9], 2)[0]


def test_a_known_prefix_is_shared_and_outlives_its_sequence():
    blocks = Blocks(6, 2)
    first = filled(blocks, [1, 2, 3, 4, 5])
    second = blocks.take_prefix(digests([1, 2, 3, 4, 7, 8], 2))
    assert second == first[:2]
    blocks.check([first, second])
    blocks.release(first)
    blocks.release(second)
    assert blocks.free == 6
    assert len(blocks.take_prefix(digests([1, 2, 9, 9], 2))) == 1


def test_the_end_of_what_has_been_free_for_longest_goes_first():
    blocks = Blocks(4, 1)
    for tokens in ([1, 2], [3, 4]):
        table = filled(blocks, tokens)
        blocks.release(table)
    other: list[int] = []
    blocks.extend(other, 0, 1)
    assert [len(blocks.take_prefix(digests(t, 1))) for t in ([1, 2], [3, 4])] == [1, 2]


def test_who_writes_to_a_shared_block_first_gets_a_copy():
    blocks = Blocks(4, 4)
    first = filled(blocks, [1, 2, 3, 4, 5])
    second = blocks.fork(first)
    shared = first[1]
    assert blocks.extend(first, 5, 6) == [Copy(shared, first[1])]
    assert blocks.extend(second, 5, 6) == []
    assert second[1] == shared != first[1] and second[0] == first[0]
    blocks.check([first, second])


def test_too_little_room_changes_nothing():
    blocks = Blocks(3, 2)
    first = filled(blocks, [1, 2, 3])
    second = blocks.fork(first)
    before = list(second)
    assert blocks.extend(second, 3, 6) is None  # a copy and one more block, of one that is free
    assert second == before
    blocks.check([first, second])


@pytest.mark.parametrize("harm", ["lost", "taken", "hash"])
def test_the_check_finds_what_is_wrong(harm):
    blocks = Blocks(4, 2)
    table = filled(blocks, [1, 2, 3, 4])
    blocks.check([table])
    if harm == "lost":
        tables = [table[:1]]
    elif harm == "taken":
        tables = [table, [blocks.count - 1]]
    else:
        tables = [table]
        blocks._hash[table[0]] = None
    with pytest.raises(JobError):
        blocks.check(tables)


def test_a_thousand_random_acts_lose_no_block():
    draw = random.Random(0)
    blocks, live = Blocks(24, 2), []
    for _ in range(1000):
        act = draw.random()
        if act < 0.4:
            tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 12))]
            table = blocks.take_prefix(digests(tokens, 2))
            if blocks.extend(table, len(table) * 2, len(tokens)) is None:
                blocks.release(table)
            else:
                for block, digest in zip(table, digests(tokens, 2)):
                    blocks.register(block, digest)
                live.append((table, len(tokens)))
        elif act < 0.6 and live:
            table, length = draw.choice(live)
            live.append((blocks.fork(table), length))
        elif act < 0.8 and live:
            i = draw.randrange(len(live))
            table, length = live[i]
            if blocks.extend(table, length, length + 1) is not None:
                live[i] = (table, length + 1)
        elif live:
            blocks.release(live.pop(draw.randrange(len(live)))[0])
        blocks.check([table for table, _ in live])
    for table, _ in live:
        blocks.release(table)
    assert blocks.free == 24
