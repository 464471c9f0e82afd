"""Tensors in large pages are the same tensors."""

import mmap
from pathlib import Path

import pytest
import torch

from frugallm.kernels import memory
from frugallm.kernels.memory import LARGE_PAGE, LINE, Room, in_large_pages


@pytest.mark.parametrize("piece", [memory.PIECE, 300])
def test_copies_are_equal_lie_on_lines_and_do_not_overlap(piece, monkeypatch):
    monkeypatch.setattr(memory, "PIECE", piece)
    room, generator = Room(), torch.Generator().manual_seed(0)
    given = [
        torch.randn(shape, generator=generator) for shape in ((3, 7), (50,), (0, 4), (9, 1, 5), (100, 3))
    ]
    given += [given[0].T, given[3].bfloat16(), (10 * given[1]).to(torch.int8)]
    taken = [room.take(x) for x in given]
    for x, y in zip(given, taken, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and y.is_contiguous()
        assert y.data_ptr() % LINE == 0 or not y.numel()
    taken[0].zero_()
    assert all(torch.equal(x, y) for x, y in zip(given[1:], taken[1:], strict=True))


def test_a_piece_begins_on_a_large_page():
    assert Room().take(torch.ones(5)).data_ptr() % LARGE_PAGE == 0


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size", [1, LARGE_PAGE, 3 * LARGE_PAGE + 5])
def test_advice_changes_no_value(size, known, monkeypatch):
    if not known:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    x = torch.zeros(size, dtype=torch.uint8)
    assert in_large_pages(x) is x and not x.any()
    x.fill_(7)
    assert bool((x == 7).all())


def flags_at(address):
    """Return what the system notes of the memory at an address."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if last:
            here = int(first, 16) <= address < int(last, 16)
        elif here and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no large pages"
)
def test_the_system_has_heard_the_advice():
    x = in_large_pages(torch.zeros(40 * LARGE_PAGE, dtype=torch.uint8))
    assert "hg" in flags_at(x.data_ptr() + LARGE_PAGE)
    assert "hg" in flags_at(Room().take(torch.ones(5)).data_ptr())
