"""Embedding and head in 4 to 8 bits, by rows.

Idea
----
In a small model the table of the vocabulary is a fifth of all weights, and engines leave it in 16 bits. Rows are read
one at a time (embedding) or all at once (head); either way each row can have its own scales.

Formula
-------
As ``rtn``, eq. (1) and (2), on the rows of the table ``(vocabulary, width)``: one scale a row at 8 bits, one a group below.

When to use it
--------------
Almost always at 8 bits. At 4 bits measure: the head's rounding error goes straight into the logits. Under a byte budget 5 or 6
bits often leave the rest of the model more than they cost; plain ``transformers`` reads 8 only.

Cost
----
Seconds; no calibration text; a few thousand rows in memory at a time. A tied table stays tied: it is stored once.

Differences from the paper
--------------------------
There is no paper. The scale at 8 bits is the plain range; below the best of 18 ranges per group in squared error.

References
----------
llama.cpp stores the same table in Q8_0 or Q6_K by default (https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import TableMethod, resolve_group_size
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class Embedding(TableMethod):
    """Store embedding and head in 4 to 8 bits."""

    card: ClassVar[Card] = Card(
        title="Embedding and head by rows",
        summary="the vocabulary's table in 4 to 8 bits, tied stays tied",
        baseline="rtn of the table in 4 bits with one scale a row",
        claim="Eight bits a row keep the model closer to the original than four.",
    )

    bits: Literal[4, 5, 6, 7, 8] = Field(8, description="bits per weight")
    group_size: int | None = Field(
        None,
        ge=-1,
        description="columns that share one scale; -1: the whole row; null: the row at 8 bits, a group below",
    )

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid for tables of these widths."""
        row_by_default = self.group_size is None and self.bits == 8
        group = resolve_group_size(self.name(), -1 if row_by_default else self.group_size, widths)
        return WeightScheme(bits=self.bits, group_size=group)

    def solve(self, rows: Tensor, scheme: WeightScheme) -> QuantizedTensor:
        """Round some rows ``(rows, width)``."""
        return round_to_nearest(rows, scheme, "minmax" if scheme.bits == 8 else "mse")

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare 8 bits with 4 bits, one scale a row: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(bits=8)], baseline=[cls(bits=4, group_size=-1)], baseline_name="4 bits, one scale a row"
        )
