"""HQQ: fit every group's grid to its weights, without any data, by half-quadratic splitting.

Idea
----
Rounding to nearest puts the grid where the extremes of a group are. Better is the grid on which the group's weights
lie closest, where a few outliers may lie far off. The error is split in two: a part that the grid accounts for, in
least squares, and a part ``e`` that a norm with ``p < 1`` gives to outliers. Each is solved in closed form with the
other held fixed. No text is read: weights decide alone.

Formula
-------
``w`` a group of a row, ``s`` its scale, ``z`` its zero point, a float; errors are measured in steps of the grid::

    q = clamp(round(w / s + z), -2^(b-1), 2^(b-1) - 1),   w' = s (q - z)             (1)
    e = s shrink((w - w') / s),   shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0) (2)
    s <- <w - e, q - z> / <q - z, q - z>                                             (3)
    z <- mean(q - (w - e) / s),   beta <- kappa beta                                 (4)

from the range of the group with a whole zero point, ``iterations`` times; of all the grids on the way the one with the
least squared error stays.

When to use it
--------------
At 2 to 4 bits where no text is at hand, or where seconds matter. With text ``gptq`` or ``awq`` lose less. Not where
input channels with outliers are met by very small weights: see the claim, which fails on such a model.

Cost
----
No calibration text; ``iterations`` roundings of every weight. Workspace: some copies of a few hundred rows.

Differences from the paper
--------------------------
There is no paper; the authors' account is a page, and their code is the reference. The code keeps the scale of the
range and moves zero points alone (``fit_scale=false``); all groups of a weight stop together when their mean error
rises, where here each keeps its best grid. The code's ``beta=10`` is in units of the weights: errors below 0.17 are not
given to ``e`` at all, which is every error of the model below, and what it computes there is plain least squares. Here
errors are measured in steps, and ``beta=2`` begins at 0.59 of a step: only what the grid cuts off is an outlier.

Zero points begin as whole numbers at any number of bits (the code does that at 4 alone). A grid without zero moves
many small weights to the same side, and where they read a large input that costs more than the fit gains.

Every third block of SmolLM2-135M in groups of 64, divergence in nats/token on 3,072 tokens of WikiText-2 valid, at 4
and at 3 bits: rounding with integer zero points 0.224 and 1.08, the code's settings 0.192 and 1.35, the defaults here
0.180 and 0.92. ``beta=10`` is better at 3 bits (0.81) and worse at 4. The squared error of weights, against
rounding's: the code 0.90 and 0.90, here 0.86 and 0.78.

Zero points are stored as float16 beside scales in bf16, 32 bits a group as in the code. The folder says so in a key
of its own, and only FrugalLM reads it. After a pruning step float zero points are whole numbers too, for zero is on no
other grid. ``zero="integer"`` fits (3) and (4) with whole zero points instead, as
compressed-tensors stores them.

References
----------
Badri, Shaji: Half-Quadratic Quantization of Large Machine Learning Models, 2023,
https://mobiusml.github.io/hqq_blog/; code https://github.com/mobiusml/hqq.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, resolve_group_size
from frugallm.compress.quantize.grids import encode, grouped, stored
from frugallm.compress.quantize.rtn import RTN
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench

_ENTRIES_AT_ONCE = (
    2**17
)  # of weights, so that what the iterations leave behind stays in the processor's cache


class HQQ(BlockMethod):
    """Grids fitted to the weights by half-quadratic splitting, no data."""

    card: ClassVar[Card] = Card(
        title="HQQ",
        summary="every group's scale and float zero point fitted to its weights, no data",
        paper="Half-Quadratic Quantization of Large Machine Learning Models",
        authors="Badri, Shaji",
        year=2023,
        venue="web page",
        code="https://github.com/mobiusml/hqq",
        baseline="rtn, asymmetric",
        claim="At 3 bits, without data, the model stays closer to the original than on asymmetric grids from the range.",
        holds=False,
        reason="the tiny model has planted channels with large inputs and weights a thirtieth of the rest; a fit to the "
        "weights alone does not know that they matter, and serves them worse than the plain range",
        expect_fail={
            "the_folder_loads_without_us_to_equal_logits": "compressed-tensors has no float zero points, so plain "
            "transformers refuses the folder"
        },
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "step"

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits per weight")
    group_size: int | None = Field(
        None,
        ge=-1,
        description="input columns that share one scale; -1: the whole row; null: 128 or what fits",
    )
    zero: Literal["float", "integer"] = Field("float", description="kind of zero points that are stored")
    fit_scale: bool = Field(True, description="fit scales as well; false: zero points alone")
    iterations: int = Field(
        20, ge=0, le=1000, description="how often all parts are solved; 0: rounding on the range"
    )
    p: float = Field(0.7, gt=0, le=1, description="exponent of the norm that outliers are measured in")
    beta: float = Field(
        2.0, gt=0, description="weight of the least squares at the start, for errors in steps"
    )
    kappa: float = Field(1.01, ge=1, le=10, description="growth of beta from one iteration to the next")

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the asymmetric grid for linears of these widths."""
        group = resolve_group_size(self.name(), self.group_size, widths)
        kind: Literal["float16", "int8"] = "float16" if self.zero == "float" else "int8"
        return WeightScheme(bits=self.bits, symmetric=False, group_size=group, zero_dtype=kind)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Fit the grid of every group of ``weight`` ``(out, in)`` and round on it."""
        weight = weight.float().contiguous()
        rows = max(1, _ENTRIES_AT_ONCE // weight.shape[1])
        # Only a whole zero point has a code for zero, and pruned weights stay zero.
        whole = self.zero == "integer" or "pruned" in statistics
        found = [self._fit(grouped(piece, scheme), scheme, whole=whole) for piece in weight.split(rows)]
        scale, zero = (torch.cat(parts) for parts in zip(*found))
        return QuantizedTensor(encode(weight, scale, zero, scheme), scale, zero, scheme)

    def _fit(self, w: Tensor, scheme: WeightScheme, *, whole: bool) -> tuple[Tensor, Tensor]:
        """Return scale and zero point ``(out, groups)``, as they are stored, for groups ``w (out, groups, columns)``."""
        scale, zero = _from_range(w, scheme)
        best_scale, best_zero, least = scale, zero, torch.full(scale.shape, torch.inf)
        beta = self.beta
        for _ in range(self.iterations + 1):
            s, z = scale.float()[..., None], zero.float()[..., None]
            q = _codes(w, s, z, scheme)
            error = w - s * (q - z)  # (1)
            loss = error.square().sum(-1)
            better = loss < least
            least = torch.where(better, loss, least)
            best_scale, best_zero = (
                torch.where(better, scale, best_scale),
                torch.where(better, zero, best_zero),
            )
            v = w - s * _shrink(error / s, self.p, beta)  # (2)
            if self.fit_scale:
                scale = _least_squares_scale(v, q - z, scale, scheme)  # (3)
            zero = _stored_zero((q - v / scale.float()[..., None]).mean(-1), scheme, whole=whole)  # (4)
            beta *= self.kappa
        return best_scale, best_zero

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with rounding at 3 bits on asymmetric grids from the range: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(bits=3)],
            baseline=[RTN(bits=3, symmetric=False)],
            baseline_name="rtn W3 asymmetric, same groups",
        )


def _codes(w: Tensor, s: Tensor, z: Tensor, scheme: WeightScheme) -> Tensor:
    return (w / s + z).round_().clamp_(*scheme.code_range)


def _shrink(x: Tensor, p: float, beta: float) -> Tensor:
    """Return the closed form for errors under a norm with exponent ``p``: zero up to ``beta^(1/(p-2))``."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-12) ** (p - 1) / beta).clamp_(min=0)


def _stored_zero(zero: Tensor, scheme: WeightScheme, *, whole: bool) -> Tensor:
    """Round zero points to what is stored; a ``whole`` one is itself the code of zero."""
    zero = zero.round().clamp(*scheme.code_range) if whole else zero.clamp(-65504, 65504)
    return zero.to(getattr(torch, scheme.zero_dtype))


def _from_range(w: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Return scale and whole zero point ``(out, groups)`` that cover each group's range, zero included."""
    first, last = scheme.code_range
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scale = stored((high - low) / (last - first), scheme)
    return scale, _stored_zero(first - low / scale.float(), scheme, whole=True)


def _least_squares_scale(v: Tensor, steps: Tensor, scale: Tensor, scheme: WeightScheme) -> Tensor:
    """Return the scale ``(out, groups)`` at which ``s steps`` is closest to ``v``; the one before where there is none."""
    fitted = (v * steps).sum(-1) / steps.square().sum(-1).clamp(min=1e-12)
    return torch.where(fitted > 0, stored(fitted, scheme), scale)
