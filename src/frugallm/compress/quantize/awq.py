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
to nearest on the target grid, ``max_g`` the widest weight of the group::

    m_j = mean |X_j|,   w_j = mean over rows of |W_j| / max_g |W|                   (1)
    s_j = m_j^a / (w_j^(1 - a) + 1e-4),   s <- s / sqrt(max s min s)                (2)
    D(s) = Q(W diag(s)) diag(s)^-1 - W                                              (3)
    minimize tr(D(s) H D(s)^T) over a in {0, 1/n, ..., (n-1)/n} and s = 1           (4)

and then for every group ``w (columns)`` of a row with its diagonal block ``H_g`` of ``H``::

    d = Q_r(w) - w      for ranges r of 60 to 100 % of the widest, on either sign    (5)
    minimize d^T H_g d                                                              (6)

When to use it
--------------
At 3 or 4 bits with a little text at hand; it is quick, needs few tokens, and ``gptq`` may follow it: ``awq
gptq:bits=4`` scales as here and rounds as there. Give both the same ``bits`` and ``group_size``.

Cost
----
Two forwards of the calibration windows per block, two second moments per site, ``grid`` roundings of every weight with
one product ``(out, in) (in, in)`` each, and 18 roundings for the ranges: 1.1 s and 0.3 s per block of SmolLM2-135M
on one core. (Judging by 256 of the rows takes a third of the time and leaves 1 % more error.) Workspace: the second
moments of all sites of a block at once (4 bytes per entry) and some copies of one site's weights.

Differences from the paper
--------------------------
The paper's scale is ``s_j = m_j^a`` (``duo=false``); (2) is what its successors AutoAWQ and llm-compressor use. On
four blocks of SmolLM2-135M, W3 and W4 in groups of 64, it leaves 0.40 to 0.43 of rounding's error on held-out inputs,
the paper's 0.55 to 0.59. The error (4) is that of the site's own products on all calibration tokens, computed from
their second moment; the authors' code measures it on stored inputs, at the output of the whole attention or
feed-forward. Inputs of the output projection are scaled as well where heads are grouped, with one scale for all query
heads of a value head; the code skips them.

The code's ranges are 55 to 100 % of the widest weight, on one sign, judged on 512 tokens, and not for q and k; here
they are the candidates of ``gptq``, judged by ``H_g`` of all tokens, for every linear. On the same blocks, after the
paper's scale, that leaves 0.29 (W3) and 0.33 (W4) of rounding's error, the code's candidates 0.38 and 0.41, and the
cheaper judgment by the diagonal of ``H`` alone 0.34 and 0.37.

The grid is symmetric by default, as plain transformers does not load asymmetric zero points in packed codes;
``symmetric=false`` gives the paper's. Groups are those that fit the model, 128 where they can be.

References
----------
Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: AWQ, MLSys 2024, https://arxiv.org/abs/2306.00978;
code https://github.com/mit-han-lab/llm-awq.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, resolve_group_size
from frugallm.compress.quantize.grids import diagonal_blocks, grouped, round_to_nearest
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.solvers import proxy_loss
from frugallm.evaluate.precision import products_in
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench
    from frugallm.walk.block import Block

WriterKind = Literal["norm", "heads", "rows"]


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
    grid: int = Field(20, ge=1, le=100, description="how many exponents are tried, from 0 up to below 1")
    duo: bool = Field(True, description="scale by the weights' own size as well; false: the paper's scale")
    clip: bool = Field(True, description="narrow a group's range where the output's error falls")
    sites: tuple[WriterKind, ...] = Field(
        ("norm", "heads", "rows"), description="which inputs are scaled, by what writes them; empty: none"
    )

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid for linears of these widths."""
        group = resolve_group_size(self.name(), self.group_size, widths)
        return WeightScheme(bits=self.bits, symmetric=self.symmetric, group_size=group)

    def rewrite(self, block: Block, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fold the best scale of eq. (4) into every site of the block."""
        mine = [p for p in block.linears if self.touches(block.full_name(p))]
        if not mine:
            return
        scheme = self.weights({block.full_name(p): block.weight(p).shape[1] for p in mine})
        for site in block.sites:
            paths = [p for p in site.linears if p in mine]
            if paths and site.writer_kind in self.sites:
                weight = torch.cat([block.weight(p) for p in paths])
                tried = scales(weight, statistics[site.name]["absmean"], scheme, self.grid, duo=self.duo)
                legal = (block.legal_scale(site, scale)[1] for scale in tried)
                with products_in(block.fast):
                    scale = best_scale(weight, statistics[site.name]["second_moment"], scheme, legal)
                block.scale_site(site, scale)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)`` on the ranges of eq. (6)."""
        if not self.clip:
            return round_to_nearest(weight, scheme)
        return round_to_nearest(weight, scheme, "mse", diagonal_blocks(statistics["second_moment"], scheme))

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare scaling alone with rounding at 3 bits on the same grid: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(bits=3, clip=False)],
            baseline=[RTN(bits=3)],
            baseline_name="rtn W3, same groups and ranges",
        )


def scales(
    weight: Tensor, absmean: Tensor, scheme: WeightScheme, grid: int, *, duo: bool
) -> Iterator[Tensor]:
    """Yield the scales ``(in,)`` to try for ``weight`` ``(out, in)``: 1, then eq. (2) for ``grid`` exponents."""
    yield torch.ones_like(absmean)
    values = grouped(weight, scheme).abs()
    share = (values / values.amax(-1, keepdim=True).clamp(min=1e-6)).view_as(weight).mean(0)  # (1)
    for step in range(grid):
        a = step / grid
        scale = absmean**a
        if duo:
            scale = scale / (share ** (1 - a) + 1e-4)
        scale = scale.clamp(min=1e-4)
        yield scale / (scale.max() * scale.min()).sqrt()  # (2)


def best_scale(
    weight: Tensor, second_moment: Tensor, scheme: WeightScheme, tried: Iterable[Tensor]
) -> Tensor:
    """Return which of the scales ``tried`` has the least error (4) for ``weight`` ``(out, in)``."""
    best, least = torch.ones(weight.shape[1]), math.inf
    for scale in tried:
        rounded = round_to_nearest(weight * scale, scheme).dequantize() / scale  # (3)
        loss = proxy_loss(weight, rounded, second_moment)
        if loss < least:
            best, least = scale, loss
    return best
