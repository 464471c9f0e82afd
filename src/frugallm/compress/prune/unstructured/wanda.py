"""Wanda: drop the weights with the smallest product of magnitude and input norm, row by row.

Idea
----
In language models some inputs are tens of times larger than the rest, and a small weight on a large input does more than
a large weight on a small one. So a weight counts by its magnitude times the norm of its input. Weights are compared
within each output row, so that no output loses more of its inputs than another. The weights that stay are not changed.

Formula
-------
``W (out, in)`` weight, ``X (tokens, in)`` inputs, ``p`` the share of zeros::

    S_ij = |W_ij| ||X_j||_2                                               (1)
    W'_ij = 0 for the p in entries of row i with the smallest S_ij        (2)

With ``n:m`` the ``n`` smallest of every ``m`` consecutive inputs of a row become zero.

When to use it
--------------
For about half of the weights, when there is little text or time. ``sparsegpt`` reads the correlations of the inputs as
well, and lets the weights that stay make up for those that go: slower, and better the more is pruned.

Cost
----
One forward of the calibration windows per block, and ``in`` numbers of statistics per site: no memory to speak of.

Differences from the paper
--------------------------
Inputs are those of the model as stored up to and including the linears before this one in the same block; the authors'
code takes those of the block before it is pruned. The norm is a root mean square, which changes no comparison. Weights
of inputs that never came are compared by magnitude. The variant with a threshold per row by cumulative score is not
there, nor is the fine-tuning afterwards.

References
----------
Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024,
https://arxiv.org/abs/2306.11695; code https://github.com/locuslab/wanda.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from frugallm.compress.contract import PruneMethod
from frugallm.compress.prune.unstructured.magnitude import Magnitude
from frugallm.compress.prune.unstructured.masks import choose_zeros
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench

NEVER_CAME = 1e-12


class Wanda(PruneMethod):
    """Set the weights with the smallest magnitude times input norm to zero, in every row."""

    card: ClassVar[Card] = Card(
        title="Wanda",
        summary="the smallest products of weight and input norm become zero, row by row",
        paper="A Simple and Effective Pruning Approach for Large Language Models",
        authors="Sun, Liu, Bair, Kolter",
        year=2024,
        venue="ICLR",
        arxiv="2306.11695",
        code="https://github.com/locuslab/wanda",
        row="p-wanda",
        baseline="magnitude",
        claim="At 50 % zeros the model stays much closer to the original than with the smallest weights zero.",
    )
    solve_needs: ClassVar[frozenset[str]] = frozenset({"mean_square"})

    def prune(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return ``weight`` ``(out, in)`` with zeros in every row, eq. (1) and (2)."""
        # Weights of inputs that never came go first, the smallest of them before the others.
        norm = statistics["mean_square"].sqrt().clamp(min=NEVER_CAME)  # (in,)
        scores = weight.abs() * norm  # (out, in), eq. (1)
        return weight.masked_fill(choose_zeros(scores, self.target, "row"), 0.0)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with magnitude at 50 %: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(sparsity=0.5)],
            baseline=[Magnitude(sparsity=0.5)],
            baseline_name="magnitude, 50 % zeros in every linear",
        )
