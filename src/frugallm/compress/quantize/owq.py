"""OWQ: keep the few input columns that rounding hurts most in 16 bits, and let them make up for the others.

Idea
----
A few input channels are so large that the error of their weights decides the error of the output. OWQ finds them by what
their rounding would cost, keeps their columns of the weight in 16 bits, and rounds the rest as GPTQ does. The kept
columns come last, so they absorb the errors that all others leave; what is stored is what they have become. Scales do
not have to cover them.

Formula
-------
``W (out, in)`` weight, ``X (tokens, in)`` inputs, ``H = X^T X``, ``Q`` rounding to nearest, ``e`` extra bits a weight::

    S_j = H_jj ||Q(W)_:j - W_:j||^2                                                 (1)
    k   = round(e in / 16)                                                          (2)
    K   = the k columns with the largest S_j                                        (3)

then GPTQ in the order: all columns outside ``K``, then those of ``K``, which are not rounded.

When to use it
--------------
At 3 bits where a hundredth of a bit a weight is to spare and FrugalLM computes the model: no engine has this form.
Where inputs have no channels that stand out it is ``gptq`` with a few weights in 16 bits.

Cost
----
That of ``gptq`` and one more search of scales, for (1). Each linear has columns of its own, so linears that share an
input need one Cholesky factor each. Workspace: 18 bytes per entry of the largest ``H``. On disk a column takes 16 bits
for each row and 4 bytes for its number, beside its codes, which are those of zero.

Differences from the paper
--------------------------
The authors give every linear of a Llama block the same number of kept weights, by constants that hold for its shapes
without grouped heads (1 for attention, 0.375 for the rest). Here every linear gets the same number of bits a weight
(2), so that each meets the target. Their division is a recipe of two steps: for 0.1 bits ``owq:extra_bits=0.17`` with
``only=*.self_attn.*`` and ``owq:extra_bits=0.064`` with ``only=*.mlp.*``. They store no codes for kept columns, so a
column costs ``16 - b`` bits a row there; and they keep an even number, which their kernel wants.

Ranges are searched as in ``gptq`` (squared error weighted by the inputs' mean square), where the authors try every
zero point with the error to the power of 2.4; (1) uses the same search. Columns outside ``K`` are taken in order of
decreasing ``H_jj`` (the authors' ``--act-order``) unless ``act_order=false``. ``choice="random"`` is no method: it
shows what the same bytes do in columns that nobody chose.

References
----------
Lee, Jin, Kim, Kim, Park: OWQ, AAAI 2024, https://arxiv.org/abs/2306.02272;
code https://github.com/xvyaward/owq.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, resolve_group_size
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import fit, round_to_nearest
from frugallm.compress.quantize.solvers import compensate
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class OWQ(BlockMethod):
    """GPTQ beside a few whole input columns in 16 bits."""

    card: ClassVar[Card] = Card(
        title="OWQ",
        summary="the few input columns that rounding hurts most stay in 16 bits and make up for the others",
        paper="OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of Large Language Models",
        authors="Lee, Jin, Kim, Kim, Park",
        year=2024,
        venue="AAAI",
        arxiv="2306.02272",
        code="https://github.com/xvyaward/owq",
        row="q-owq",
        baseline="gptq",
        claim="With 0.1 bits a weight more than GPTQ at 3 bits per row the model stays closer to the original.",
        expect_fail={
            "the_folder_loads_without_us_to_equal_logits": "compressed-tensors has no columns beside the codes; plain "
            "transformers refuses the folder, and loads what 'frugal export --to dense' writes"
        },
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "step"
    solve_needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})
    by_rows: ClassVar[bool] = False

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(3, description="bits per weight outside the kept columns")
    extra_bits: float = Field(
        0.1, ge=0, le=4, description="bits a weight spent on kept columns, on average over each linear"
    )
    group_size: int | None = Field(
        -1,
        ge=-1,
        description="input columns that share one scale; -1: the whole row; null: 128 or what fits",
    )
    symmetric: bool = Field(False, description="no zero point")
    damp: float = Field(0.01, ge=0, le=1, description="added to the diagonal of H, as a fraction of its mean")
    act_order: bool = Field(
        True, description="take the rounded columns in order of decreasing H_jj, with static groups"
    )
    search: Literal["minmax", "mse"] = Field("mse", description="how a group's range is chosen")
    choice: Literal["sensitivity", "random"] = Field(
        "sensitivity", description="which columns are kept; random: a control"
    )

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid for linears of these widths."""
        group = resolve_group_size(self.name(), self.group_size, widths)
        extras = ("columns",) if self.extra_bits else ()
        return WeightScheme(bits=self.bits, symmetric=self.symmetric, group_size=group, extras=extras)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Solve ``weight`` ``(out, in)``: keep columns, eq. (1) to (3), and round the others."""
        h = statistics["second_moment"]
        kept = self._columns(weight, scheme, h) if self.extra_bits else None
        # Every range holds zero, so columns of zeros are columns that no scale has to cover.
        covered = weight if kept is None else weight.index_fill(1, kept, 0.0)
        scale, zero = fit(covered, scheme, self.search, importance=h.diagonal())
        return compensate(
            weight,
            h,
            scale,
            zero,
            scheme,
            damp=self.damp,
            act_order=self.act_order,
            pruned=statistics.get("pruned"),
            kept=kept,
        )

    def _columns(self, weight: Tensor, scheme: WeightScheme, h: Tensor) -> Tensor:
        """Return which columns ``(k,)`` are kept."""
        count = min(round(self.extra_bits * weight.shape[1] / 16), weight.shape[1])  # (2)
        if self.choice == "random":
            shuffled = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
            return shuffled[:count]
        return sensitivity(weight, h, scheme, self.search).topk(count).indices

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with GPTQ at 3 bits per row on the same grid: KL to the original, held-out text."""
        grid = {"bits": 3, "group_size": -1, "symmetric": False}
        claim = bench.claim_lower(
            ours=[cls(extra_bits=0.1)],
            baseline=[GPTQ(**grid)],
            baseline_name="gptq W3 per row, asymmetric",
        )
        random = bench.kl(cls(extra_bits=0.1, choice="random"))
        four = bench.kl(GPTQ(**{**grid, "bits": 4}))
        gap = claim.baseline_value - four
        closed = {
            name: (claim.baseline_value - value) / gap
            for name, value in (("sensitivity", claim.value), ("random", random))
        }
        details = {
            "bits": [bench.stored_bits(cls(extra_bits=0.1)), bench.stored_bits(GPTQ(**grid))],
            "kl_random_columns": random,
            "kl_gptq_4_bits": four,
            "share_of_the_gap_closed": closed,
        }
        return claim.model_copy(update={"details": {**claim.details, **details}})


def sensitivity(
    weight: Tensor, second_moment: Tensor, scheme: WeightScheme, search: Literal["minmax", "mse"] = "mse"
) -> Tensor:
    """Return what rounding each column of ``weight (out, in)`` would cost, ``(in,)``, eq. (1)."""
    importance = second_moment.diagonal()
    rounded = round_to_nearest(weight, scheme, search, importance).dequantize()
    return importance * (rounded - weight).square().sum(0)
