"""RPTQ: input channels of like range form clusters, and each cluster has a static grid of its own.

Idea
----
Channels of one input differ in range and in where their range lies. One scale and one zero point for all of them, fixed
beforehand, wastes most codes on most channels. Channels whose smallest and largest values are alike can share a grid at
little loss, and a few such clusters are enough. Engines want the channels of a cluster side by side, so the paper puts
them in that order, in the weights that write and read them; hence the name.

Formula
-------
``X (tokens, in)`` inputs of a site, ``k`` clusters, ``b`` bits, codes from ``-2^(b-1)`` to ``2^(b-1) - 1``::

    clusters = k-means of the points (max X_j, min X_j)                       (1)
    s_c = (max over c of max X_j - min over c of min X_j) / (2^b - 1)         (2)
    z_c = round(-2^(b-1) - min over c of min X_j / s_c)                       (3)
    x_j <- s_c (clamp(round(x_j / s_c) + z_c) - z_c)         for j in c       (4)

When to use it
--------------
To see what static inputs of 8 bits or fewer cost at best when no scale is moved. No engine multiplies by clusters;
FrugalLM reads the result and computes (4).

Cost
----
No forward beside the walk's own; ``k``-means of ``in`` points per site from ten beginnings. Workspace: none beyond the
channels' extremes. Stored: one byte a channel and six a cluster for every linear.

Differences from the paper
--------------------------
Nothing is put in another order: that would change neither a code nor a product, only where an engine finds them. What
is stored is the cluster of every channel. So there is nothing to fold, and rotary positions, grouped heads and gates,
which leave no room for a new order, are no obstacle.

The authors take 4 clusters for what attention reads, 4 a head for what the output projection reads, and 32 for what the
feed-forward reads; here it is one number for all, and a recipe may have two steps with ``only``. Queries, keys and
values, which they round as well, are not inputs of linears and stay as they are. Ranges are divided by ``2^b - 1``, not
``2^b``, so that both ends are on the grid. Weights are rounded to nearest with one scale a row, unless a later step of
the recipe (``gptq``, as theirs) rounds them.

References
----------
Yuan, Niu, Liu, Liu, Wang, Shang, Sun, Wu, Wu, Wu: RPTQ: Reorder-based Post-training Quantization for Large Language
Models, 2023, https://arxiv.org/abs/2304.01089; code https://github.com/hahnyuan/RPTQ4LLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod
from frugallm.compress.quantize.clusters import cluster_grid, k_means
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class RPTQ(BlockMethod):
    """Static inputs with one grid for every cluster of channels."""

    card: ClassVar[Card] = Card(
        title="RPTQ",
        summary="input channels of like range form clusters, each rounded on a static grid of its own",
        paper="RPTQ: Reorder-based Post-training Quantization for Large Language Models",
        authors="Yuan, Niu, Liu, Liu, Wang, Shang, Sun, Wu, Wu, Wu",
        year=2023,
        venue="arXiv",
        arxiv="2304.01089",
        code="https://github.com/hahnyuan/RPTQ4LLM",
        row="q-rptq",
        baseline="the same with one static grid a tensor (clusters=1)",
        claim="At 8 and at 6 bits static inputs lose less with clusters than with one grid a tensor.",
        expect_fail={
            "the_folder_loads_without_us_to_equal_logits": "compressed-tensors has no clusters of input channels; plain "
            "transformers refuses the folder"
        },
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "default"

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(8, description="bits per weight")
    input_bits: Literal[4, 5, 6, 7, 8] = Field(8, description="bits of inputs")
    clusters: int = Field(4, ge=1, le=256, description="clusters of channels of every input")
    by: Literal["range", "chance"] = Field(
        "range",
        description="which channels share a grid: those of like range, or as many at random, to compare with",
    )

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid: one scale a row."""
        return WeightScheme(bits=self.bits)

    def activations(self, name: str) -> ActivationScheme:
        """Return how inputs are rounded."""
        return ActivationScheme(bits=self.input_bits, dynamic=False, clusters=self.clusters)

    def input_needs(self, scheme: ActivationScheme) -> frozenset[str]:
        """Return the names of the statistics that the clusters are made from."""
        return frozenset({"extremes"})

    def input_parameters(
        self, scheme: ActivationScheme, statistics: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return clusters of channels and their grids, eq. (1) to (3)."""
        extremes = statistics["extremes"]  # (2, in)
        labels = k_means(extremes.T, self.clusters) if self.by == "range" else self.at_random(extremes)
        half = 2 ** (scheme.bits - 1)
        scale, zero = cluster_grid(extremes, labels, self.clusters, (-half, half - 1))
        return {"input_clusters": labels.to(torch.uint8), "input_scale": scale, "input_zero_point": zero}

    def at_random(self, extremes: Tensor) -> Tensor:
        """Return clusters of equal size, ``(in,)``, that have nothing to do with the channels."""
        order = torch.randperm(extremes.shape[1], generator=torch.Generator().manual_seed(0))
        return order % self.clusters

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)`` to nearest."""
        return round_to_nearest(weight, scheme)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with one grid a tensor at 6 bits and at 8: KL to the original, held-out text."""
        at_6, at_8 = (
            bench.claim_lower(
                ours=[cls(input_bits=bits)],
                baseline=[cls(input_bits=bits, clusters=1)],
                baseline_name=f"W8A{bits}, one static grid a tensor",
            )
            for bits in (6, 8)
        )
        others = {"4 at random": cls(input_bits=6, by="chance"), "32": cls(input_bits=6, clusters=32)}
        measured = {name: bench.evaluate(step).kl for name, step in others.items()}
        kl = {name: measure and measure.value for name, measure in measured.items()}
        details = {**at_6.details, "a8": at_8.model_dump(mode="json"), "kl_a6_of_other_clusters": kl}
        reason = at_6.reason or (at_8.reason and f"at 8 bits, {at_8.reason}")
        return at_6.model_copy(
            update={"passed": at_6.passed and at_8.passed, "reason": reason, "details": details}
        )
