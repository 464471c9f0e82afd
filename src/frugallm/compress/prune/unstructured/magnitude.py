"""Magnitude: the smallest weights of every linear become zero. The baseline.

Idea
----
A weight close to zero adds little to its output, so it can go. No text is needed and the weights that stay are not
changed. Inputs of language models differ in size by orders of magnitude, which this does not see; whatever looks at the
inputs is measured against it.

Formula
-------
``W (out, in)`` weight, ``p`` the share of zeros, over all entries of ``W``::

    S_ij = |W_ij|                                                           (1)
    W'_ij = 0 for the p out in entries with the smallest S_ij, else W_ij    (2)

With ``n:m`` the ``n`` smallest of every ``m`` consecutive inputs of a row become zero.

When to use it
--------------
As a baseline, or for a share so small that nothing is lost. Otherwise ``wanda`` or ``sparsegpt``.

Cost
----
Seconds; no calibration text; memory of one block.

Differences from the paper
--------------------------
There is no single paper. Compared within a linear, as SparseGPT and Wanda do for this baseline; a threshold for the
whole model would need two passes. Of equal weights the first go, so the share is exact.

References
----------
Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015,
https://arxiv.org/abs/1506.02626.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from frugallm.compress.contract import PruneMethod
from frugallm.compress.prune.unstructured.masks import choose_zeros
from frugallm.compress.prune.unstructured.random import Random
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class Magnitude(PruneMethod):
    """Set the smallest weights of every linear to zero."""

    card: ClassVar[Card] = Card(
        title="Magnitude pruning",
        summary="the baseline of pruning: the smallest weights become zero",
        baseline="random",
        claim="At 30 % zeros the model stays far closer to the original than with zeros at random places.",
    )
    by_rows: ClassVar[bool] = False

    def prune(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return ``weight`` ``(out, in)`` with the smallest entries zero, eq. (1) and (2)."""
        return weight.masked_fill(choose_zeros(weight.abs(), self.target, "layer"), 0.0)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with random places at 30 %: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(sparsity=0.3)],
            baseline=[Random(sparsity=0.3)],
            baseline_name="random, 30 % zeros in every linear",
        )
