"""Round to nearest: every weight goes to the grid value next to it. The baseline.

Idea
----
Cut each row of a weight into groups, give each group a scale that covers its range, and round. No text is needed and
nothing is optimized; every other weight-only method is measured against this one.

Formula
-------
For a group ``w`` of ``g`` weights and ``b`` bits, symmetric::

    s = max |w| / ((2^b - 1) / 2)                                   (1)
    q = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1),   w' = s q      (2)

Asymmetric, with ``l = min(w, 0)`` and ``h = max(w, 0)``::

    s = (h - l) / (2^b - 1),  z = round(-2^(b-1) - l / s),  w' = s (q - z)

On a float grid, whose largest value is ``m`` (6 in FP4, 448 in FP8)::

    s = max |w| / m,   w' = s nearest(w / s)

When to use it
--------------
At 8 bits it is as good as anything. At 4 bits and below prefer ``gptq``.

Cost
----
Seconds; no calibration text; memory of one block.

Differences from the paper
--------------------------
There is no single paper. ``search="mse"`` tries 17 narrower ranges per group as GPTQ's reference code can (``mse``);
the baseline of all claims is ``search="minmax"``. In ``mxfp4`` the scale is rounded up to a power of two, so nothing is
cut off; compressed-tensors rounds down where at most a seventh would be. In ``nvfp4`` the one scale a tensor is a power
of two, so that products of both scales are exact in bf16.

References
----------
The grids are those of compressed-tensors (https://github.com/vllm-project/compressed-tensors). MXFP4: OCP Microscaling
Formats 1.0. NVFP4: NVIDIA, 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.number_formats import DESCRIPTION, NumberFormat, scheme_for
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class RTN(BlockMethod):
    """Round every weight to the nearest value of its group's grid."""

    card: ClassVar[Card] = Card(
        title="Round to nearest",
        summary="the baseline of weight-only quantization: scale, round, done",
        baseline="rtn with one scale a row",
        claim="Groups of columns with a scale each lose less than one scale a row at the same bits.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "step"

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits per weight")
    group_size: int | None = Field(
        None,
        ge=-1,
        description="input columns that share one scale; -1: the whole row; null: 128 or what fits",
    )
    symmetric: bool = Field(True, description="no zero point")
    grid: NumberFormat = Field("int", description=DESCRIPTION)
    search: Literal["minmax", "mse"] = Field("minmax", description="how a group's range is chosen")

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
        """Round ``weight`` ``(out, in)``, eq. (1) and (2)."""
        return round_to_nearest(weight, scheme, self.search)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare groups with one scale a row at 4 bits: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(bits=4)], baseline=[cls(bits=4, group_size=-1)], baseline_name="rtn W4, one scale a row"
        )
