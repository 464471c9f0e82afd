"""SmoothQuant: move the difficulty of rounding activations into the weights, then store both in 8 bits.

Idea
----
A few input channels are tens of times larger than the rest and spoil the scale of the whole tensor; weights are even.
Dividing channel *j* of the input by ``s_j`` and multiplying column *j* of the weight by ``s_j`` changes nothing, and
the division is folded into whatever writes the input. After that an 8-bit grid fits both.

Formula
-------
``X (tokens, in)`` inputs of a site, ``W (out, in)`` all weights that read it::

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)                      (1)
    Y = (X diag(s)^-1) (W diag(s))^T                                 (2)

When to use it
--------------
For engines that multiply in int8 (W8A8). Static scales need it most; with one scale a token it matters less.

Cost
----
One extra forward of the calibration windows per block. Workspace: none beyond the channel maxima.

Differences from the paper
--------------------------
The authors smooth only where a norm writes the input. Here the inputs of the output projection (through the value
rows; the scale is the same for all query heads of a value head) and of the down projection (through the up rows) are
smoothed as well: the latter is the worst input of this kind of model. ``sites`` gives the authors' choice.
Weights are rounded per row rather than per tensor. A later step of the recipe (``gptq``) may round them instead.

References
----------
Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant, ICML 2023, https://arxiv.org/abs/2211.10438;
code https://github.com/mit-han-lab/smoothquant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, matches
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench
    from frugallm.models.family import Site
    from frugallm.walk.block import Block

WriterKind = Literal["norm", "heads", "rows"]


class SmoothQuant(BlockMethod):
    """Smooth activations into weights; weights and activations in 8 bits."""

    card: ClassVar[Card] = Card(
        title="SmoothQuant",
        summary="scales moved from activations to weights, then both in 8 bits",
        paper="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        authors="Xiao, Lin, Seznec, Wu, Demouth, Han",
        year=2023,
        venue="ICML",
        arxiv="2211.10438",
        code="https://github.com/mit-han-lab/smoothquant",
        row="q-smoothquant",
        baseline="the same without smoothing (sites=[])",
        claim="With one static scale a tensor, W8A8 stays far closer to the original than without smoothing.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "default"
    rewrite_needs: ClassVar[frozenset[str]] = frozenset({"absmax"})

    alpha: float = Field(0.5, ge=0, le=1, description="share of the difficulty that moves to the weights")
    sites: tuple[WriterKind, ...] = Field(
        ("norm", "heads", "rows"), description="which inputs are smoothed, by what writes them; empty: none"
    )
    activation: Literal["static", "token"] = Field(
        "static", description="one activation scale a tensor, fixed beforehand, or one a token at run time"
    )
    token: tuple[str, ...] = Field(
        (), description="name patterns of linears whose input gets a scale a token anyway"
    )

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return 8 bits with one float32 scale a row."""
        return WeightScheme(bits=8, group_size=None, scale_dtype="float32")

    def activations(self, name: str) -> ActivationScheme:
        """Return 8 bits, static or per token."""
        return ActivationScheme(bits=8, dynamic=self.activation == "token" or matches(name, self.token))

    def rewrite(self, block: Block, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fold eq. (1) into every site of the block."""
        for site in block.sites:
            if site.writer_kind in self.sites and any(self.touches(block.full_name(p)) for p in site.linears):
                block.scale_site(site, self.smoothing(block, site, statistics[site.name]["absmax"]))

    def smoothing(self, block: Block, site: Site, absmax: Tensor) -> Tensor:
        """Return ``s (in,)`` of eq. (1)."""
        weights = torch.cat([block.weight(p) for p in site.linears])  # (sum of out, in)
        largest = weights.abs().amax(0).clamp(min=1e-5)
        return (absmax.clamp(min=1e-5) ** self.alpha / largest ** (1 - self.alpha)).clamp(min=1e-5)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)`` to 8 bits."""
        return round_to_nearest(weight, scheme)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with no smoothing, static scales: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls()], baseline=[cls(sites=())], baseline_name="W8A8 static without smoothing"
        )
