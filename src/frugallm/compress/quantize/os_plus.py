"""Outlier Suppression+: center every channel, shrink those above one threshold, and search that threshold.

Idea
----
Outliers of activations sit in a few channels, and many of those lie on one side of zero. Taking the middle of its
range away from every channel makes both sides alike; dividing only the channels that still reach beyond a threshold
brings the range of the whole tensor down to it. Both change nothing once the weights and biases that read the input
follow. The lower the threshold, the harder the weights become to round, so it is searched: the one with which the
site's outputs, inputs and weights rounded, stay closest to the exact ones.

Formula
-------
``X (tokens, in)`` inputs of a site, ``W (out, in)`` all weights that read it, ``b`` their biases, ``A`` and ``Q`` the
rounding of inputs and of weights as they will be stored::

    z_j = (max X_j + min X_j) / 2                                               (1)
    r_j = (max X_j - min X_j) / 2        or max |X_j| where z is not taken away
    s_j(t) = max(1, r_j / t)                                                    (2)
    Y = ((X - z) diag(s)^-1) (W diag(s))^T + (b + W z)                          (3)
    minimize || A((X - z) diag(s)^-1) Q(W diag(s))^T - (X - z) W^T ||^2  over t (4)

When to use it
--------------
For inputs rounded to 8 bits or fewer with static scales, above all where norms and linears have biases (GPT-2, OPT,
GPT-NeoX). ``os_plus gptq:bits=4`` shifts and scales as here and rounds weights as there; give both the same ``bits``.

Cost
----
One extra forward of the calibration windows per block. For each of ``steps`` thresholds one rounding of every weight
and one product with the inputs of 256 tokens: 1.5 s per block of SmolLM2-135M on one core, a fifth of that with
``steps=16``, which leaves at most 5 % more of the loss. Workspace: 256 tokens of every site's input, and some copies of
one site's weights.

Differences from the paper
--------------------------
The shift (1) needs a bias that writes the input and biases in all linears that read it. RMSNorm and the linears of
Llama and its kin have none, and the authors' code does not shift there either; nothing is shifted then, and eq. (2)
and (4) hold with ``z = 0``. Where it can be, the input of the output projection is shifted and scaled as well (through
the value rows: attention's weights sum to one), and that of the down projection scaled (through the up rows).

The loss (4) is that of the linears' own outputs, all that read a site together, on 256 calibration tokens of the block
as it was; the authors take the output of the attention for q, k and v, and that of the gated product for gate and up.
Thresholds are equally spaced in their logarithm, from the largest range of a channel to the smallest, below which
nothing changes any more; the authors space them evenly and end at 0.1 (Llama) or 1 (OPT). The first is the largest
range, which scales nothing, so the search loses nothing against it.

Grids of inputs are symmetric, as engines load them; the authors' configurations are asymmetric. A step of the recipe
that rounds the weights (``gptq``) does not change what (4) assumes of them: to nearest, one scale a row.

References
----------
Wei, Zhang, Li, Zhang, Gong, Guo, Liu: Outlier Suppression+, EMNLP 2023, https://arxiv.org/abs/2304.09145;
code https://github.com/ModelTC/Outlier_Suppression_Plus.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, matches
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.smoothquant import SmoothQuant
from frugallm.evaluate.precision import products_in
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench
    from frugallm.models.family import Site
    from frugallm.walk.block import Block

WriterKind = Literal["norm", "heads", "rows"]
#: Smallest threshold, as a share of the largest range: a channel that hardly ever is anything sets no end.
LEAST_SHARE = 1e-3


class OSPlus(BlockMethod):
    """Shift and scale activations by a searched threshold; weights and activations in few bits."""

    card: ClassVar[Card] = Card(
        title="Outlier Suppression+",
        summary="channels centered and shrunk to one searched threshold, then weights and inputs rounded",
        paper="Outlier Suppression+: Accurate quantization of large language models by equivalent and effective "
        "shifting and scaling",
        authors="Wei, Zhang, Li, Zhang, Gong, Guo, Liu",
        year=2023,
        venue="EMNLP",
        arxiv="2304.09145",
        code="https://github.com/ModelTC/Outlier_Suppression_Plus",
        row="q-os-plus",
        baseline="the same without shift and scale (sites=[])",
        claim="With one static scale a tensor, W6A6 stays closer to the original than without shift and scale.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "default"
    rewrite_needs: ClassVar[frozenset[str]] = frozenset({"extremes", "sample"})

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(8, description="bits per weight")
    input_bits: Literal[4, 5, 6, 7, 8] = Field(8, description="bits of inputs")
    activation: Literal["static", "token"] = Field(
        "static", description="one activation scale a tensor, fixed beforehand, or one a token at run time"
    )
    token: tuple[str, ...] = Field(
        (), description="name patterns of linears whose input gets a scale a token anyway"
    )
    sites: tuple[WriterKind, ...] = Field(
        ("norm", "heads", "rows"),
        description="which inputs are shifted and scaled, by what writes them; empty: none",
    )
    shift: bool = Field(True, description="center channels where biases can hold it")
    steps: int = Field(100, ge=1, le=1000, description="how many thresholds are tried")

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid: one scale a row."""
        return WeightScheme(bits=self.bits)

    def activations(self, name: str) -> ActivationScheme:
        """Return how inputs are rounded: static or per token."""
        dynamic = self.activation == "token" or matches(name, self.token)
        return ActivationScheme(bits=self.input_bits, dynamic=dynamic)

    def rewrite(self, block: Block, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fold eq. (1) and (2) into every site of the block."""
        for site in block.sites:
            paths = [p for p in site.linears if self.touches(block.full_name(p))]
            seen = statistics[site.name]
            if not paths or site.writer_kind not in self.sites or not len(seen["sample"]):
                continue
            extremes, sample = tied(seen["extremes"], block, site), seen["sample"]
            if self.shift and block.takes_shift(site):
                middle = extremes.mean(0)  # (1)
                block.shift_site(site, middle)
                extremes, sample = extremes - middle, sample - middle
            weight = torch.cat([block.weight(p) for p in paths])
            inputs = self.activations(block.full_name(paths[0]))
            scheme = self.weights({})
            block.scale_site(
                site, best_scale(weight, sample, extremes, scheme, inputs, self.steps, block.fast)
            )

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)`` to nearest."""
        return round_to_nearest(weight, scheme)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with neither shift nor scale, W6A6 static: KL to the original, held-out text; SmoothQuant at W8A8."""
        claim = bench.claim_lower(
            ours=[cls(bits=6, input_bits=6)],
            baseline=[cls(bits=6, input_bits=6, sites=())],
            baseline_name="W6A6 static without shift and scale",
        )
        measured = {step.name(): bench.evaluate(step).kl for step in (cls(), SmoothQuant())}
        kl = {name: measure and measure.value for name, measure in measured.items()}
        return claim.model_copy(update={"details": {**claim.details, "kl_w8a8_static": kl}})


def tied(extremes: Tensor, block: Block, site: Site) -> Tensor:
    """Return channel extremes ``(2, in)``, where values write them the widest of each query group for all of it."""
    if site.writer_kind != "heads":
        return extremes
    heads = extremes.view(2, block.heads.values, block.heads.repeats, block.heads.width)
    widest = torch.stack([heads[0].amin(1, keepdim=True), heads[1].amax(1, keepdim=True)])
    return widest.expand_as(heads).reshape(2, -1)


def scales(extremes: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield the scales ``(in,)`` of eq. (2) for thresholds from the largest range of a channel to the smallest."""
    ranges = extremes.abs().amax(0)  # (in,)
    largest = float(ranges.max())
    if largest == 0:
        yield torch.ones_like(ranges)
        return
    least = max(float(ranges[ranges > 0].min()), LEAST_SHARE * largest)
    for step in range(steps):
        threshold = largest * (least / largest) ** (step / max(steps - 1, 1))
        yield (ranges / threshold).clamp(min=1)


def best_scale(
    weight: Tensor,
    x: Tensor,
    extremes: Tensor,
    scheme: WeightScheme,
    inputs: ActivationScheme,
    steps: int,
    fast: torch.dtype = torch.float32,
) -> Tensor:
    """Return the scale ``(in,)`` with the least loss (4).

    Parameters
    ----------
    weight
        ``(out, in)``.
    x
        ``(tokens, in)``, shifted.
    extremes
        ``(2, in)``, those of all tokens, shifted.
    scheme, inputs
        How weights and inputs will be rounded, one scale a row.
    steps
        How many thresholds to try.
    fast
        Type in which codes are multiplied.
    """
    exact = x @ weight.T
    best, least = torch.ones_like(x[0]), math.inf
    for scale in scales(extremes, steps):
        absmax = None if inputs.dynamic else extremes.abs().amax(0) / scale
        with products_in(fast):
            rounded = rounded_product(x / scale, weight * scale, absmax, scheme, inputs)
        loss = float((rounded - exact).square().sum())
        if loss < least:
            best, least = scale, loss
    return best


def rounded_product(
    x: Tensor, weight: Tensor, absmax: Tensor | None, scheme: WeightScheme, inputs: ActivationScheme
) -> Tensor:
    """Return ``A(x) Q(weight)^T`` ``(tokens, out)`` as integer engines compute it: a product of codes, then the scales.

    Codes up to 8 bits are exact in bfloat16, so a fast product of them is exact as well.
    """
    q = round_to_nearest(weight, scheme)
    last = 2 ** (inputs.bits - 1) - 1
    extent = x.abs().amax(-1, keepdim=True) if absmax is None else absmax.max()
    step = (extent / (last + 0.5)).clamp(min=1e-8)
    codes = (x / step).round_().clamp_(-last - 1, last)
    return (codes @ q.codes.float().T) * step * q.scale.float().T
