"""AWQ: scale up the input channels that matter before rounding, then narrow each group's range.

Idea
----
A weight's rounding error costs as much as its input is large. Multiplying column *j* of a weight by ``s_j > 1`` and
dividing its input by ``s_j`` changes nothing, but the error of that column, seen from the output, shrinks by ``s_j``,
as long as the group's step does not grow as much. How strongly channels are scaled is one exponent per site, found by
trying; the division is folded into whatever writes the input. Then the range of every group is narrowed where cutting
off its widest weights costs the output less than the finer step gains.

Formula
-------
``X (tokens, in)`` inputs of a site, ``H = X^T X / tokens``, ``W (out, in)`` all weights that read it, ``Q`` rounding
to nearest on the target grid::

    m_j = mean |X_j|,   s_j = max(m_j^a, 1e-4),   s <- s / sqrt(max s min s)         (1)
    D(s) = Q(W diag(s)) diag(s)^-1 - W                                              (2)
    minimize tr(D(s) H D(s)^T) over a in {0, 1/n, ..., (n-1)/n}                      (3)

and then for every group ``w (columns)`` of a row with its diagonal block ``H_g`` of ``H``::

    d_p = Q(clamp(w, -p max|w|, p max|w|)) - w,  p in {1, 0.95, ..., 0.55}           (4)
    minimize d_p^T H_g d_p                                                           (5)

When to use it
--------------
At 3 or 4 bits with a little text at hand; it is quick, needs few tokens, and ``gptq`` may follow it: ``awq
gptq:bits=4`` scales as here and rounds as there. Give both the same ``bits`` and ``group_size``.

Cost
----
Two forwards of the calibration windows per block, two second moments per site, ``grid`` roundings of every weight with
one product ``(out, in) (in, in)`` each, and ten roundings for the ranges. Workspace: the second moments of all sites
of a block at once (4 bytes per entry) and three copies of one site's weights.

Differences from the paper
--------------------------
The error (3) is that of the site's own products on all calibration tokens, computed from their second moment; the
authors' code measures it on stored inputs, at the output of the whole attention or feed-forward. Ranges are likewise
chosen on all tokens, where the code takes 512. Inputs of the output projection are scaled as well where heads are
grouped, with one scale for all query heads of a value head; the code skips them. Ranges of q and k are narrowed too,
which the code leaves out. The grid is symmetric by default, as plain transformers does not load asymmetric zero points
in packed codes; ``symmetric=false`` gives the paper's. Groups are those that fit the model, 128 where they can be.

References
----------
Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: AWQ, MLSys 2024, https://arxiv.org/abs/2306.00978;
code https://github.com/mit-han-lab/llm-awq.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, resolve_group_size
from frugallm.compress.quantize.grids import decode, encode, fit, grouped, round_to_nearest
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.solvers import proxy_loss
from frugallm.evaluate.precision import products_in
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench
    from frugallm.models.family import Site
    from frugallm.walk.block import Block

WriterKind = Literal["norm", "heads", "rows"]
#: Shares of a group's widest weight that are tried as its range, eq. (4).
RANGES = tuple(1 - step / 20 for step in range(10))


class AWQ(BlockMethod):
    """Activation-aware scales and ranges, then rounding to nearest."""

    card: ClassVar[Card] = Card(
        title="AWQ",
        summary="input channels that matter are scaled up before rounding; ranges chosen by the output's error",
        paper="AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration",
        authors="Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han",
        year=2024,
        venue="MLSys",
        arxiv="2306.00978",
        code="https://github.com/mit-han-lab/llm-awq",
        row="q-awq",
        baseline="rtn",
        claim="At 3 bits scaling alone, with the plain ranges of rtn, keeps the model closer to the original than rtn.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "default"
    rewrite_needs: ClassVar[frozenset[str]] = frozenset({"absmean", "second_moment"})
    solve_needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits per weight")
    group_size: int | None = Field(
        None,
        ge=-1,
        description="input columns that share one scale; -1: the whole row; null: 128 or what fits",
    )
    symmetric: bool = Field(True, description="no zero point")
    grid: int = Field(20, ge=1, le=100, description="how many exponents are tried, from 0 up; 1: no scaling")
    clip: bool = Field(True, description="narrow a group's range where the output's error falls")
    sites: tuple[WriterKind, ...] = Field(
        ("norm", "heads", "rows"), description="which inputs are scaled, by what writes them; empty: none"
    )

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid for linears of these widths."""
        group = resolve_group_size(self.name(), self.group_size, widths)
        return WeightScheme(bits=self.bits, symmetric=self.symmetric, group_size=group)

    def rewrite(self, block: Block, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fold the best scale of eq. (1) to (3) into every site of the block."""
        widths = {
            p: block.weight(p).shape[1] for p in block.family.linears if self.touches(block.full_name(p))
        }
        for site in block.family.sites:
            mine = [p for p in site.linears if p in widths]
            if mine and site.writer_kind in self.sites:
                weight = torch.cat([block.weight(p) for p in mine])
                with products_in(block.fast):
                    scale = best_scale(
                        weight, statistics[site.name], self.weights(widths), self.grid, _legal(block, site)
                    )
                block.scale_site(site, scale)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)`` on the ranges of eq. (4) and (5)."""
        if not self.clip:
            return round_to_nearest(weight, scheme)
        scale, zero = best_ranges(weight, statistics["second_moment"], scheme)
        return QuantizedTensor(encode(weight, scale, zero, scheme), scale, zero, scheme)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare scaling alone with rounding at 3 bits on the same grid: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(bits=3, clip=False)],
            baseline=[RTN(bits=3)],
            baseline_name="rtn W3, same groups and ranges",
        )


def _legal(block: Block, site: Site) -> Callable[[Tensor], Tensor]:
    return lambda scale: block.legal_scale(site, scale)[1]


def best_scale(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    scheme: WeightScheme,
    grid: int,
    legal: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> Tensor:
    """Return the scale ``(in,)`` of eq. (1) with the least error (3).

    Parameters
    ----------
    weight
        ``W (out, in)``: all weights of the site.
    statistics
        ``absmean (in,)`` and ``second_moment (in, in)`` of the site's input.
    scheme
        The target grid.
    grid
        How many exponents are tried: 0, ``1/grid``, up to below 1.
    legal
        Makes a scale one that can be folded.
    """
    best, least = torch.ones(weight.shape[1]), math.inf
    for step in range(grid):
        scale = (statistics["absmean"] ** (step / grid)).clamp(min=1e-4)
        scale = legal(scale / (scale.max() * scale.min()).sqrt())  # (1)
        rounded = round_to_nearest(weight * scale, scheme).dequantize() / scale
        loss = proxy_loss(weight, rounded, statistics["second_moment"])  # (3)
        if loss < least:
            best, least = scale, loss
    return best


def best_ranges(weight: Tensor, second_moment: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point ``(out, groups)`` of the ranges with the least error (5)."""
    size = scheme.columns_per_scale(weight.shape[1])
    starts = range(0, weight.shape[1], size)
    blocks = torch.stack(
        [second_moment[i : i + size, i : i + size] for i in starts]
    )  # (groups, columns, columns)
    values = grouped(weight, scheme)  # (out, groups, columns)
    widest = values.abs().amax(-1, keepdim=True)
    scale, zero = fit(weight, scheme)
    least = torch.full(widest.shape[:2], torch.inf)
    for p in RANGES:
        cut = torch.clamp(values, -p * widest, p * widest).view_as(weight)
        s, z = fit(cut, scheme)
        d = grouped(decode(encode(weight, s, z, scheme), s, z) - weight, scheme).transpose(0, 1)  # (4)
        loss = (torch.bmm(d, blocks) * d).sum(-1).T  # (5), (out, groups)
        better = loss < least
        scale, least = torch.where(better, s, scale), torch.where(better, loss, least)
        if z is not None and zero is not None:
            zero = torch.where(better, z, zero)
    return scale, zero
