"""LoRC: after rounding, add the best product of two thin matrices that makes up for what rounding lost.

Idea
----
Where rounding alone costs too much, part of its error can be stored after all: the largest singular directions of the
error matrix need two thin factors, a few per cent of the weight's bytes. It works with any method that rounds.

Formula
-------
``W (out, in)`` weight, ``Q`` what was stored for it, ``m`` the rank::

    E = W - Q,   E = U S V^T                                                (1)
    A = U_m S_m^(1/2),   B = S_m^(1/2) V_m^T,   W' = Q + A B                (2)

With ``weighted`` the error is that of the layer's output: with ``H = L L^T``, the second moment of the input, (1) is
taken of ``E L`` and ``B`` is multiplied by ``L^-1`` from the right, which minimizes ``tr((W - W') H (W - W')^T)``.

When to use it
--------------
With large weights, where two thin factors are cheap: at 4096 inputs and outputs rank 8 in 8 bits takes 0.03 bits a
weight. On small models they are not: 0.22 bits on a 576 x 576 weight, 0.44 with 192 rows, and smaller groups may give
more for the same bytes. The report shows whole bytes, factors included.

Cost
----
One singular value decomposition a linear, ``O(min(out, in)^2 max(out, in))``; no calibration text unless ``weighted``.

Differences from the paper
--------------------------
The paper also studies which rounding to use under it (its own is layer-wise distillation); here any step before it
rounds (``gptq lorc``), and alone it rounds to nearest itself, in groups. Factors are stored in 8 bits, with a scale for
every rank, as the paper allows; ``factor_bits=16`` keeps them in bf16. ``weighted`` is not in the paper (LQER,
arXiv 2402.02446, and others do it); the paper's form is the default.

References
----------
Yao, Wu, Li, Youn, He: ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank
Compensation, 2023, https://arxiv.org/abs/2303.08302.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, resolve_group_size
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.rtn import RTN
from frugallm.formats.extras import LowRank
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class LoRC(BlockMethod):
    """Low-rank compensation of the rounding error."""

    card: ClassVar[Card] = Card(
        title="ZeroQuant-V2 (LoRC)",
        summary="two thin matrices beside the codes make up for the largest part of the rounding error",
        paper="ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation",
        authors="Yao, Wu, Li, Youn, He",
        year=2023,
        venue="arXiv; AAAI 2024",
        arxiv="2303.08302",
        code="https://github.com/microsoft/DeepSpeed",
        row="q-zeroquant-v2",
        baseline="rtn",
        claim="At 3 bits the model stays closer to the original than with the same rounding alone.",
        expect_fail={
            "the_folder_loads_without_us_to_equal_logits": "compressed-tensors has no low-rank part; plain transformers "
            "refuses the folder"
        },
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "default"
    adds: ClassVar[tuple[str, ...]] = (LowRank.kind,)

    rank: int = Field(8, ge=1, le=4096, description="columns of A, rows of B")
    factor_bits: Literal[8, 16] = Field(8, description="bits in which both factors are stored")
    weighted: bool = Field(
        False, description="make up for the error of the output, not of the weights; reads text"
    )
    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits per weight where no other step rounds")
    group_size: int | None = Field(
        None,
        ge=-1,
        description="where no other step rounds: input columns that share one scale; -1: the whole row; null: 128 or what fits",
    )
    symmetric: bool = Field(True, description="where no other step rounds: no zero point")

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid for linears of these widths."""
        group = resolve_group_size(self.name(), self.group_size, widths)
        return WeightScheme(bits=self.bits, symmetric=self.symmetric, group_size=group)

    @property
    def repair_needs(self) -> frozenset[str]:
        """The second moment, where the output's error counts."""
        return frozenset({"second_moment"}) if self.weighted else frozenset()

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)``."""
        return round_to_nearest(weight, scheme)

    def repair(
        self, weight: Tensor, stored: QuantizedTensor, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Add eq. (2) to what is ``stored`` of ``weight`` ``(out, in)``."""
        root = _root(statistics["second_moment"]) if self.weighted else None
        a, b = low_rank(weight - stored.dequantize(), self.rank, root)
        return stored.plus(LowRank.of(a, b, self.factor_bits))

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with the same rounding alone at 3 bits: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(bits=3)], baseline=[RTN(bits=3)], baseline_name="rtn W3, same groups, no low-rank part"
        )


def _root(second_moment: Tensor) -> Tensor:
    """Return a lower triangular ``L (in, in)`` float64 with ``L L^T`` the second moment, slightly damped."""
    h = second_moment.double()
    h = h + 1e-4 * h.diagonal().mean().clamp(min=1e-12) * torch.eye(len(h), dtype=torch.float64)
    return torch.linalg.cholesky(h)


def low_rank(error: Tensor, rank: int, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``A (out, rank)`` and ``B (rank, in)``, eq. (1) and (2), for an ``error`` ``(out, in)``.

    Parameters
    ----------
    root
        Lower triangular ``L (in, in)``: ``|(error - A B) L|`` is least; ``None``: ``|error - A B|`` is.

    Notes
    -----
    The rank is at most that of the weight.
    """
    target = error if root is None else (error.double() @ root)
    u, s, vt = torch.linalg.svd(target, full_matrices=False)
    rank = min(rank, len(s))
    a, b = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vt[:rank]
    if root is not None:
        b = torch.linalg.solve_triangular(root, b, upper=False, left=False)
    return a.float(), b.float()
