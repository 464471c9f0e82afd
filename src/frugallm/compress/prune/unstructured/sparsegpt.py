"""SparseGPT: choose zeros column by column; the columns still free make up for what goes.

Idea
----
A weight that becomes zero changes the layer's output; the weights that stay can take over part of what it did. With the
second moment ``H`` of the layer's inputs the best correction is known in closed form, and so is the error that is left:
the score by which zeros are chosen. Columns are taken in one order for all rows, as in GPTQ, so that one Cholesky factor
of the inverse serves the whole weight. With ``bits``, weights are chosen and rounded in the same pass, and the columns
that follow make up for both.

Formula
-------
``W (out, in)`` weight, ``X (tokens, in)`` inputs, ``H = X^T X + damp mean(diag) I``, ``H^-1 = U^T U`` with upper ``U``::

    S_ij = w_ij^2 / U_jj^2                                               (1)
    w'_ij = 0 for the p entries with the smallest S_ij of 128 columns,
            else w_ij, or quant(w_ij) with bits                          (2)
    e_j = (w_j - w'_j) / U_jj               for column j in order        (3)
    w_k <- w_k - e_j U_jk                   for every later k            (4)

Scores are those of the weights as they are when the first of the 128 columns is reached. With ``n:m`` the ``n`` smallest
of every ``m`` consecutive inputs of a row become zero, by their scores when the first of the ``m`` is reached.

When to use it
--------------
For half of the weights or more, with a little text at hand. ``wanda`` is faster and needs no memory.

Cost
----
One forward of the calibration windows per block, and ``O(in^3 + out in^2)`` per linear. Workspace: 18 bytes per entry of
the largest ``H``. Wants 24,000 tokens or more: ``H`` has no higher rank than there are tokens.

Differences from the paper
--------------------------
Inputs are those of the model as stored up to and including the linears before this one in the same block ("true
sequential"). The share of zeros is exact: of equal scores the first go. With ``bits``, ranges are those of ``gptq``:
fixed beforehand from the weights as they were. ``act_order`` (GPTQ's, not in the paper) takes columns in order of
decreasing ``H_jj``; it cannot be had with ``n:m``, whose groups are neighbors. Selection compares all rows of one
linear, so linears that share an input are solved one by one.

References
----------
Frantar, Alistarh: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, ICML 2023,
https://arxiv.org/abs/2301.00774; code https://github.com/IST-DASLab/sparsegpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import PruneMethod, resolve_group_size
from frugallm.compress.prune.unstructured.magnitude import Magnitude
from frugallm.compress.prune.unstructured.masks import Sparsity
from frugallm.compress.quantize.grids import fit
from frugallm.compress.quantize.solvers import compensate, prune_and_compensate
from frugallm.errors import ParameterError
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class SparseGPT(PruneMethod):
    """Set weights to zero column by column with closed-form compensation, and round the others if asked to."""

    card: ClassVar[Card] = Card(
        title="SparseGPT",
        summary="zeros chosen column by column; later columns make up for what goes",
        paper="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        authors="Frantar, Alistarh",
        year=2023,
        venue="ICML",
        arxiv="2301.00774",
        code="https://github.com/IST-DASLab/sparsegpt",
        row="p-sparsegpt",
        baseline="magnitude",
        claim="At 50 % zeros the model stays much closer to the original than with the smallest weights zero.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "step"
    solve_needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})
    by_rows: ClassVar[bool] = False

    damp: float = Field(0.01, ge=0, le=1, description="added to the diagonal of H, as a fraction of its mean")
    act_order: bool = Field(False, description="take columns in order of decreasing H_jj; not with n:m")
    bits: Literal[2, 3, 4, 5, 6, 7, 8] | None = Field(
        None,
        description="bits of the weights that stay, rounded in the same pass; null: they are not rounded",
    )
    group_size: int | None = Field(
        None,
        ge=-1,
        description="with bits: input columns that share one scale; -1: the whole row; null: 128 or what fits",
    )
    symmetric: bool = Field(True, description="with bits: no zero point")
    search: Literal["minmax", "mse"] = Field("mse", description="with bits: how a group's range is chosen")

    @property
    def rounds(self) -> bool:
        """Whether the weights that stay are rounded."""
        return self.bits is not None

    def zeros(self, widths: Mapping[str, int]) -> Sparsity:
        """Return share and pattern of the zeros in linears of these widths."""
        zeros = super().zeros(widths)
        if self.act_order and zeros.group:
            raise ParameterError(
                f"{self.name()}: act_order takes columns out of the order in which pattern {self.pattern} groups them",
                "Use act_order=false, or pattern=unstructured",
            )
        return zeros

    def weights(self, widths: Mapping[str, int]) -> WeightScheme | None:
        """Return the grid for linears of these widths; ``None`` where nothing is rounded."""
        if self.bits is None:
            return None
        group = resolve_group_size(self.name(), self.group_size, widths)
        return WeightScheme(bits=self.bits, symmetric=self.symmetric, group_size=group)

    def prune(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Prune ``weight`` ``(out, in)``, eq. (1) to (4)."""
        h = statistics["second_moment"]
        return prune_and_compensate(weight, h, self.target, damp=self.damp, act_order=self.act_order)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Prune and round ``weight`` ``(out, in)`` in one pass, eq. (1) to (4)."""
        h = statistics["second_moment"]
        # Ranges for the weights that will be there: many of the small ones go, and those that stay grow.
        kept = self.prune(weight, statistics) if self.sparsity else weight
        scale, zero = fit(kept, scheme, self.search, importance=h.diagonal())
        return compensate(
            weight,
            h,
            scale,
            zero,
            scheme,
            damp=self.damp,
            act_order=self.act_order,
            sparsity=self.target,
        )

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with magnitude at 50 %: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(sparsity=0.5)],
            baseline=[Magnitude(sparsity=0.5)],
            baseline_name="magnitude, 50 % zeros in every linear",
        )
