"""The limits of this machine that speed is held against: reading memory, and products of int8 and of bf16."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS, LEAST_SECONDS = 7, 0.02
READ_BYTES, PRODUCT = 1 << 28, 1024


def seconds(work: Callable[[], Any], rounds: int = ROUNDS, least: float = LEAST_SECONDS) -> float:
    """Return the median over rounds of the seconds of one call, after a first one.

    Parameters
    ----------
    rounds, least
        How often, and for how many seconds each, the call is repeated.
    """
    work()
    found = []
    for _ in range(rounds):
        calls, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < least or not calls:
            work()
            calls += 1
        found.append(spent / calls)
    return statistics.median(found)


def limits(rounds: int = ROUNDS, size: int = PRODUCT, read: int = READ_BYTES) -> dict[str, float]:
    """Measure what the machine does at most now, with as many threads as torch uses.

    Parameters
    ----------
    rounds
        Repeats, of which the median counts.
    size
        Inputs and outputs of the products; twice as many rows.
    read
        Bytes of memory that are summed up; more than the processor's cache holds.

    Returns
    -------
    dict
        ``memory`` in bytes a second, ``bf16`` and ``int8`` in operations a second, a product of two numbers and its
        sum counting as two.
    """
    memory = torch.ones(read // 8, dtype=torch.int64)
    wide = torch.randn(2 * size, size).bfloat16()
    whole = torch.randint(-100, 100, (2 * size, size), dtype=torch.int8)
    count = 2 * 2 * size**3
    return {
        "memory": read / seconds(memory.sum, rounds),
        "bf16": count / seconds(lambda: wide @ wide[:size], rounds),
        "int8": count / seconds(lambda: torch._int_mm(whole, whole[:size]), rounds),
    }
