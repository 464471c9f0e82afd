"""Tiled attention: exact attention, a chunk of positions at a time, whose score matrix is never stored.

Idea
----
Attention as it is written down stores a score for every pair of positions, then their weights, then multiplies: memory
that grows with the square of the text, and that is written and read several times. But a softmax can be put together
from parts: each chunk of keys gives a largest score, a sum of weights and a weighted sum of values, and two such parts
are joined by scaling both to the larger maximum. So a query passes over its keys once, everything stays in the
processor's cache, and pairs that a query may not see are never computed.

Formula
-------
``q (head)`` one query, ``K_c, V_c (256, head)`` keys and values of chunk ``c``, chunks counted from position 0::

    s_c = scale K_c q                 of the positions that q sees             (1)
    m_c = max s_c,   w_c = bf16(exp(s_c - m_c)),   l_c = sum w_c,   o_c = w_c V_c   (2)
    m' = max(m, m_c),   a = exp(m - m'),   b = exp(m_c - m')                   (3)
    l <- a l + b l_c,   o <- a o + b o_c,   m <- m'         first chunk to last (4)
    attention = o / l                                                          (5)

When to use it
--------------
Always, and nobody has to ask: the native step computes all attention so, one token behind a long text as well as a
prompt's chunks, over keys and values that lie in blocks of a paged cache. ``FRUGAL_KERNELS=reference`` does without.

Cost
----
As many products as there are pairs in sight. Memory beside the cache: a chunk's scores and weights of up to eight
queries, on the stack of the thread; and where few queries stand behind a long text, (2) of all chunks, so that threads
can share them: 1 KB per 256 positions for each of these queries.

Differences from the paper
--------------------------
For a processor's cache in place of a GPU's shared memory. Chunks are counted from position 0, not from the query, and
joined from the first to the last: a token's result is the same bit for bit however the text was cut into steps and
whoever computes it. Their parts may be computed by several threads, as Flash-Decoding does it. Keys, values, queries
and weights are bf16 and everything else float32. Forward only. Sliding windows and grouped heads are known.

References
----------
Dao, Fu, Ermon, Rudra, Ré: FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness, NeurIPS 2022,
https://arxiv.org/abs/2205.14135; code https://github.com/Dao-AILab/flash-attention. The running maximum and sum:
Milakov, Gimelshein: Online normalizer calculation for softmax, 2018, https://arxiv.org/abs/1805.02867. Parts of a long
text by several threads: Dao, Haziza, Massa, Sizov: Flash-Decoding, 2023, https://pytorch.org/blog/flash-decoding.
"""

from __future__ import annotations

import statistics
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from frugallm.inference.contract import InferenceMethod
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench

#: Tokens of the claim's texts, each twice the one before.
LENGTHS = (1024, 2048, 4096)
#: Squared error, over the square of the exact attention, that still counts as the same output.
SAME = 1e-5
#: Growth of memory from one length to the next that still counts as linear; a score matrix grows fourfold.
LINEAR = 2.5
ROUNDS = 3


class TiledAttention(InferenceMethod):
    """Exact attention by chunks of positions."""

    card: ClassVar[Card] = Card(
        title="Tiled attention (FlashAttention)",
        summary="exact attention by chunks with a running maximum and sum; the score matrix is never stored",
        paper="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
        authors="Dao, Fu, Ermon, Rudra, Ré",
        year=2022,
        venue="NeurIPS",
        arxiv="2205.14135",
        code="https://github.com/Dao-AILab/flash-attention",
        row="s-attention",
        baseline="attention that stores the score matrix of a head, in torch",
        claim="At 4,096 tokens it takes less memory and no more time than attention that stores a head's score matrix; the "
        "memory grows with the text and not with its square; the output is that of float64 within 1e-5 of its square.",
    )
    tolerance: ClassVar[float] = 1e-4

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare memory, time and output with a stored score matrix, on queries, keys and values of the bench's model."""
        from frugallm.evaluate.memory import extra_bytes
        from frugallm.evaluate.precision import fast_dtype
        from frugallm.inference.measures import attention_inputs, in_turn, seconds_of
        from frugallm.kernels import library, operations
        from frugallm.models.open import dense_model
        from frugallm.threads import threads

        cls.check_claim(bench)
        tokens = text_of(bench.windows, max(LENGTHS))
        queries, keys, values, scale = attention_inputs(dense_model(bench.checkpoint), tokens)
        share = len(queries) // len(keys)  # query heads of each head of keys
        heads = [(q, keys[i // share], values[i // share]) for i, q in enumerate(queries)]

        def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return operations.attend(q, k, v, torch.arange(len(q), dtype=torch.int32), scale)

        fast, found = fast_dtype(), {}
        with threads(1):  # arms do not share their work among several alike
            for length in LENGTHS:
                given = [x[:length] for x in heads[0]]
                q, k, v = (x.to(fast) for x in given)
                arms = {
                    "tiled": partial(tiled, *given),
                    "matrix": partial(by_matrix, q, k, v, scale),
                    "torch": partial(fused, q, k, v, scale),
                }
                times = in_turn({name: partial(seconds_of, arm) for name, arm in arms.items()}, ROUNDS)
                found[length] = {
                    name: {"bytes": extra_bytes(arm), "seconds": statistics.median(times[name])}
                    for name, arm in arms.items()
                }
            errors = [error(tiled(*head), *head, scale) for head in heads]
        return verdict(bench, found, max(errors), {"path": library.path_name(), "matrix in": str(fast)})


def by_matrix(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return causal attention ``(length, head)`` as it is written down, and as eager ``transformers`` computes it."""
    scores = q @ k.T * scale
    scores = scores + torch.full_like(scores, -torch.inf).triu(1)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return the same by torch's own tiled kernel."""
    q, k, v = (x[None, None] for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def error(found: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    """Return the squared error over the square of attention in float64 on the same inputs, which the cache keeps in bf16."""
    q, k, v = (x.bfloat16().double() for x in (q, k, v))
    wrong = whole = 0.0
    for first in range(0, len(q), 512):
        rows = q[first : first + 512]
        scores = rows @ k.T * scale
        scores += torch.full_like(scores, -torch.inf).triu(first + 1)
        exact = scores.softmax(-1) @ v
        wrong += float((found[first : first + 512] - exact).square().sum())
        whole += float(exact.square().sum())
    return wrong / whole


def text_of(windows: Tensor, length: int) -> Tensor:
    """Return ``length`` token ids of windows ``(windows, length)``, from the start again if they hold fewer."""
    tokens = windows.flatten()
    return tokens.repeat(-(-length // len(tokens)))[:length]


def verdict(
    bench: Bench, found: dict[int, dict[str, dict[str, float]]], apart: float, details: dict[str, Any]
) -> Claim:
    """Return the claim from bytes and seconds of both arms by length, and the largest error of a head."""
    longest = found[LENGTHS[-1]]
    grown = max(found[b]["tiled"]["bytes"] / max(1, found[a]["tiled"]["bytes"]) for a, b in pairwise(LENGTHS))
    failed = {
        f"its squared error is {apart:.1e}": apart > SAME,
        "it takes more memory": longest["tiled"]["bytes"] >= longest["matrix"]["bytes"],
        f"twice the text takes {grown:.1f} times the memory": grown > LINEAR,
        "it is slower": longest["tiled"]["seconds"] > longest["matrix"]["seconds"],
    }
    return Claim(
        metric=f"memory of a head at {LENGTHS[-1]:,} tokens, MB",
        value=longest["tiled"]["bytes"] / 1e6,
        baseline="stored score matrix",
        baseline_value=longest["matrix"]["bytes"] / 1e6,
        passed=not any(failed.values()),
        model=bench.model_name,
        reason=", ".join(reason for reason, true in failed.items() if true),
        details={
            "by length": {str(length): arms for length, arms in found.items()},
            "largest squared error": apart,
            "growth": grown,
            "times faster": {
                str(length): {name: arm["seconds"] / arms["tiled"]["seconds"] for name, arm in arms.items()}
                for length, arms in found.items()
            },
            "threads": 1,
            **details,
        },
    )
