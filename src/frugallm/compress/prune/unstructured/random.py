"""Random: zeros at random places. What choosing is worth is measured against this.

Idea
----
A share of every linear's weights becomes zero, whichever they are. A way of choosing that is no better than this has not
seen anything.

Formula
-------
``W (out, in)`` weight, ``p`` the share of zeros, ``S (out, in)`` uniform random numbers::

    W'_ij = 0 for the p out in entries with the smallest S_ij, else W_ij    (1)

With ``n:m``, ``n`` random ones of every ``m`` consecutive inputs of a row become zero.

When to use it
--------------
Never, but to compare with.

Cost
----
Seconds; no calibration text; memory of one block.

Differences from the paper
--------------------------
There is no paper.

References
----------
Blalock, Gonzalez Ortiz, Frankle, Guttag: What is the State of Neural Network Pruning?, MLSys 2020,
https://arxiv.org/abs/2003.03033, asks for this baseline.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import PruneMethod
from frugallm.compress.prune.unstructured.masks import choose_zeros
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class Random(PruneMethod):
    """Set random weights of every linear to zero."""

    card: ClassVar[Card] = Card(
        title="Random pruning",
        summary="zeros at random places: what every way of choosing must beat",
        baseline="random with twice the zeros",
        claim="Half of the zeros cost the model less.",
    )
    by_rows: ClassVar[bool] = False

    seed: int = Field(0, ge=0, lt=2**32, description="of the random places")

    def prune(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return ``weight`` ``(out, in)`` with zeros at random places, eq. (1)."""
        # The same places in every run, a resumed one included, and others in every linear: drawn from its own values.
        generator = torch.Generator().manual_seed(zlib.crc32(weight.contiguous().numpy().data, self.seed))
        scores = torch.rand(weight.shape, generator=generator)  # (out, in)
        return weight.masked_fill(choose_zeros(scores, self.target, "layer"), 0.0)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare 15 % with 30 % zeros: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(sparsity=0.15)], baseline=[cls(sparsity=0.3)], baseline_name="random, 30 % zeros"
        )
