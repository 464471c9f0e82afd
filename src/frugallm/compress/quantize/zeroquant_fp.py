"""ZeroQuant-FP: weights in 4-bit floats by GPTQ, inputs in 8-bit floats, and scales that an exponent can hold.

Idea
----
Inputs of large models have long tails. Integers spend the same step everywhere; floats are fine near zero and coarse
far out, so one scale a token or a tensor costs them less. The same holds for 4-bit weights, where GPTQ needs no more
than another grid. Where every weight scale is a power of two, FP4 becomes FP8 by adding to the exponent, and no
multiplication is needed before the product (M1). Weaker and more accurate: one real scale a row, and all its groups at a
power of two below it (M2).

Formula
-------
``w`` a group of weights, ``x`` a token, ``E2M1`` values ``0, .5, 1, 1.5, 2, 3, 4, 6`` and ``E4M3`` up to 448, either sign::

    S = max|w| / 6,     w' = S E2M1(w / S)                                (1)
    M1: S <- 2^ceil(log2 S)                                               (2)
    M2: S_g <- S_max / 2^k_g,  S_max of the row,  k_g = log2(S_max / S_g) rounded down or up,
        as the error of the group is less                                 (3)
    s = max|x| / 448,   x' = s E4M3(x / s)                                (4)

Codes are chosen column by column by GPTQ (see ``gptq``) on the values of (1).

When to use it
--------------
For engines that multiply in FP8. ``scales="m1"`` with groups of 32 is MXFP4, which engines load. Another step that
rounds replaces the weights (``zeroquant_fp gptq:bits=4`` has integer weights and FP8 inputs), and ``lorc`` after it adds
the paper's low-rank compensation.

Cost
----
That of ``gptq``. Static input scales take the maxima of the same forward.

Differences from the paper
--------------------------
The paper leaves open how ``k`` is rounded, and over how many rows the scale of M2 is shared: here each group takes the
better of the two roundings, weighted by the mean squares of its inputs, and rows do not share. Scales are stored in bf16
with M2 and without constraint, as exponents with M1; a chip would store M2 as exponents, too. Groups are of 128 or what
fits, where the paper has 256; with M1 of 32. The paper's FP4 study includes E3M0, which is not here. Weights in 8 bits
are left to ``rtn:grid=fp8,bits=8``. GPTQ is ours, with columns in order of decreasing ``H_jj``.

References
----------
Wu, Yao, He: ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats, NeurIPS
workshop ENLSP 2023, https://arxiv.org/abs/2307.09782.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, resolve_group_size
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import best_of, fit, power_of_two, stored
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.solvers import compensate
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench

MX_GROUP = 32


class ZeroQuantFP(BlockMethod):
    """FP4 weights by GPTQ, FP8 inputs."""

    card: ClassVar[Card] = Card(
        title="ZeroQuant-FP",
        summary="weights in 4-bit floats by GPTQ, inputs in 8-bit floats, scales powers of two",
        paper="ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats",
        authors="Wu, Yao, He",
        year=2023,
        venue="NeurIPS workshop ENLSP",
        arxiv="2307.09782",
        row="q-zeroquant-fp",
        baseline="the same with inputs in INT8",
        claim="With one static scale a tensor, inputs in FP8 lose less than inputs in INT8 over the same 8-bit weights.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "default"
    solve_needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    scales: Literal["m1", "m2", "real"] = Field(
        "m1", description="scales of weights: powers of two; powers of two below that of the row; any"
    )
    group_size: int | None = Field(
        None,
        ge=-1,
        description="input columns that share one scale; -1: the whole row; null: with m1 32, else 128, or what fits",
    )
    input: Literal["fp8", "int8"] = Field("fp8", description="how inputs are rounded")
    activation: Literal["token", "static"] = Field(
        "token", description="one activation scale a token at run time, or one a tensor, fixed beforehand"
    )
    search: Literal["minmax", "mse"] = Field("minmax", description="how a group's range is chosen")
    damp: float = Field(0.01, ge=0, le=1, description="added to the diagonal of H, as a fraction of its mean")
    act_order: bool = Field(True, description="take columns in order of decreasing H_jj, with static groups")

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return FP4 with scales as ``scales`` says."""
        group_size = self.group_size
        if group_size is None and self.scales == "m1" and all(w % MX_GROUP == 0 for w in widths.values()):
            group_size = MX_GROUP
        group = resolve_group_size(self.name(), group_size, widths)
        scale_dtype = "float8_e8m0fnu" if self.scales == "m1" else "bfloat16"
        return WeightScheme(bits=4, grid="e2m1", group_size=group, scale_dtype=scale_dtype)

    def activations(self, name: str) -> ActivationScheme:
        """Return FP8 or INT8, per token or static, eq. (4)."""
        grid: Literal["e4m3", "int"] = "e4m3" if self.input == "fp8" else "int"
        return ActivationScheme(grid=grid, dynamic=self.activation == "token")

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Solve ``weight`` ``(out, in)`` on the grid of eq. (1), with scales by eq. (2) or (3)."""
        h = statistics["second_moment"]
        # Eq. (2) lies in the type of the scales: they are rounded up to it.
        scale, _ = fit(weight, scheme, self.search, importance=h.diagonal())
        if self.scales == "m2":
            scale = below_the_largest(weight, scale, scheme, h.diagonal())
        return compensate(
            weight,
            h,
            scale,
            None,
            scheme,
            damp=self.damp,
            act_order=self.act_order,
            pruned=statistics.get("pruned"),
        )

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare FP8 with INT8 inputs, static, over 8-bit weights; the rest of the paper's sentences in the details."""
        claim = bench.claim_lower(
            ours=[cls(activation="static"), RTN(bits=8)],
            baseline=[cls(activation="static", input="int8"), RTN(bits=8)],
            baseline_name="the same with inputs in INT8, static",
        )
        details = {**claim.details, "kl": _other_sentences(bench)}
        return claim.model_copy(update={"details": details})


def below_the_largest(weight: Tensor, scale: Tensor, scheme: WeightScheme, importance: Tensor) -> Tensor:
    """Return scales ``(out, groups)`` at powers of two below the largest of their row, eq. (3).

    ``scale`` are those without the constraint, ``importance (in,)`` the weights of the squared error.
    """
    largest = scale.float().amax(1, keepdim=True)
    # With k rounded up the scale is at most as large as without the constraint.
    below = 1 / power_of_two(largest / scale.float())
    candidates = [(stored(largest * below * p, scheme), None) for p in (1.0, 2.0)]
    above = torch.minimum(candidates[1][0].float(), largest).to(scale.dtype)
    return best_of(weight, scheme, [candidates[0], (above, None)], importance)[0]


def _other_sentences(bench: Bench) -> dict[str, float]:
    """Return mean KL of what else the paper compares: per token, FP4 with INT4, and constraints on scales."""
    group = resolve_group_size("zeroquant_fp", None, bench.widths)
    size = -1 if group is None else group
    recipes: dict[str, list[BlockMethod]] = {
        "per token, inputs in FP8": [ZeroQuantFP(), RTN(bits=8)],
        "per token, inputs in INT8": [ZeroQuantFP(input="int8"), RTN(bits=8)],
        "rtn INT4": [RTN(group_size=size)],
        "rtn FP4": [RTN(group_size=size, grid="fp4")],
        "gptq INT4": [GPTQ(group_size=size, search="minmax")],
        "gptq FP4": [GPTQ(group_size=size, search="minmax", grid="fp4")],
        "W4A8, scales real": [ZeroQuantFP(group_size=size, scales="real")],
        "W4A8, scales M2": [ZeroQuantFP(group_size=size, scales="m2")],
        "W4A8, scales M1": [ZeroQuantFP(group_size=size, scales="m1")],
    }
    return {what: bench.kl(*steps) for what, steps in recipes.items()}
