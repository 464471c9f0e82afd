"""GPTQ: round column by column and let the columns still free make up for the error.

Idea
----
What matters is not the error of a weight but the error of the layer's output on real inputs. With the second moment
``H`` of those inputs the best correction of all columns not yet rounded is known in closed form. GPTQ takes the columns
in one order for all rows, so that one Cholesky factor of the inverse serves the whole weight.

Formula
-------
``W (out, in)`` weight, ``X (tokens, in)`` inputs, ``H = X^T X + damp mean(diag) I``, ``H^-1 = U^T U`` with upper ``U``::

    minimize ||X (W' - W)^T||^2                                      (1)
    e_j = (w_j - quant(w_j)) / U_jj         for column j in order    (2)
    w_k <- w_k - e_j U_jk                   for every later k        (3)

When to use it
--------------
Weight-only compression to 3 or 4 bits with a little text at hand. At 8 bits rounding is as good. After a step that
prunes, the zeros stay and the weights that are left make up for the rounding; ``sparsegpt:bits=4`` does both at once.

Cost
----
One forward of the calibration windows per block, one ``H`` per site, and ``O(in^3 + out in^2)`` per linear. Workspace:
18 bytes per entry of the largest ``H``. Wants 24,000 tokens or more: ``H`` has no higher rank than there are tokens.

Differences from the paper
--------------------------
Columns are taken in order of decreasing ``H_jj`` (``act_order``), which the authors added to their code later, with
*static* groups: every column uses the scale of its own group, computed beforehand, so nothing has to be stored about
the order. Without it GPTQ lost to plain rounding on SmolLM2-135M although its proxy loss was far lower. Inputs are
those of the model as stored up to and including the linears before this one in the same block ("true sequential").
Symmetric by default, as engines load that everywhere. ``search="mse"`` (the code's ``mse``, here with the input's mean
square as weight, and with either sign of the scale) is the default; ``search="minmax"`` is the paper's plain range.
``grid`` takes other grids than integers: only (2) changes.

References
----------
Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023, https://arxiv.org/abs/2210.17323;
code https://github.com/IST-DASLab/gptq.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod
from frugallm.compress.quantize.grids import fit, in_units
from frugallm.compress.quantize.number_formats import DESCRIPTION, NumberFormat, scheme_for
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.solvers import compensate
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class GPTQ(BlockMethod):
    """Round column by column with closed-form compensation."""

    card: ClassVar[Card] = Card(
        title="GPTQ",
        summary="round column by column; later columns make up for the error of earlier ones",
        paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        authors="Frantar, Ashkboos, Hoefler, Alistarh",
        year=2023,
        venue="ICLR",
        arxiv="2210.17323",
        code="https://github.com/IST-DASLab/gptq",
        row="q-gptq",
        baseline="rtn",
        claim="At 3 bits the model stays much closer to the original than with rounding to nearest.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "step"
    solve_needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits per weight")
    group_size: int | None = Field(
        None,
        ge=-1,
        description="input columns that share one scale; -1: the whole row; null: 128 or what fits",
    )
    symmetric: bool = Field(True, description="no zero point")
    grid: NumberFormat = Field("int", description=DESCRIPTION)
    damp: float = Field(0.01, ge=0, le=1, description="added to the diagonal of H, as a fraction of its mean")
    act_order: bool = Field(True, description="take columns in order of decreasing H_jj, with static groups")
    search: Literal["minmax", "mse"] = Field("mse", description="how a group's range is chosen")

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid for linears of these widths."""
        return scheme_for(
            self.name(),
            self.grid,
            widths,
            bits=self.bits,
            symmetric=self.symmetric,
            group_size=self.group_size,
        )

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Solve ``weight`` ``(out, in)``, eq. (1) to (3)."""
        h = statistics["second_moment"]
        weight, unit = in_units(weight, scheme)
        scale, zero = fit(weight, scheme, self.search, importance=h.diagonal())
        q = compensate(
            weight,
            h,
            scale,
            zero,
            scheme,
            damp=self.damp,
            act_order=self.act_order,
            pruned=statistics.get("pruned"),
        )
        return replace(q, unit=unit)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with rounding at 3 bits on the same grid: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(bits=3, search="minmax")], baseline=[RTN(bits=3)], baseline_name="rtn W3, same groups"
        )
