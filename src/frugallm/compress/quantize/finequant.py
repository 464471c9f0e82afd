"""FineQuant: round to nearest, with groups no smaller than each matrix needs.

Idea
----
One scale a row is cheap, and it fails where few bits meet a few wide weights: they widen the step for the whole row.
How much smaller groups help differs from matrix to matrix and can be read from the weights alone. So every matrix gets
the widest groups whose ranges are nearly as narrow, on average, as those of the smallest groups allowed.

Formula
-------
``W (out, in)`` all weights that read one input, ``m_g(r, k) = max |W|`` over group ``k`` of ``g`` columns of row ``r``. The
step of a group is proportional to ``m``, and the mean squared error of rounding to the square of the step::

    rho(g) = mean over r, k of m_g(r, k)^2                                  (1)
    g = the largest of {in, ..., 2 least, least} with rho(g) <= (1 + alpha) rho(least)     (2)

``in`` is the whole row; the others are the powers of two that divide ``in``. Then round to nearest in groups of ``g``.

When to use it
--------------
At 3 or 4 bits without any text. A step that solves may follow and rounds in the groups chosen here: ``finequant
gptq:bits=3``; that step's own ``group_size`` is then replaced.

Cost
----
Every weight is read twice, once to choose and once to round; seconds, no calibration text, memory of one block.

Differences from the paper
--------------------------
The paper describes its search in words: begin with the whole column and halve the group as long as that still narrows
the range of values by much. Its statistic and its threshold were not at hand when this was written, and no code of the
authors is known to us; (1) and (2) are a definite rule of that kind, ``alpha`` is ours. Linears that share an input get
one size, for engines fuse them. Sizes are powers of two, as kernels want them, and not halves of the width (72 for a
width of 576). Scales are symmetric, ``max |w|`` over ``(2^b - 1) / 2`` codes as everywhere here. The paper's kernels for
GPUs are not part of this: the result is an ordinary folder in which the size of the groups differs between linears.
vLLM loads groups of 32, 64 and 128 and whole rows; ``largest=128`` leaves the others out.

References
----------
Kim, Henry, Fahim, Awadalla: FineQuant, ENLSP workshop at NeurIPS 2023, https://arxiv.org/abs/2308.09723.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, together
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.rtn import RTN
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench
    from frugallm.models.checkpoint import Checkpoint


class FineQuant(BlockMethod):
    """Round to nearest in groups whose size is chosen for each matrix."""

    card: ClassVar[Card] = Card(
        title="FineQuant",
        summary="the size of the groups chosen for each matrix from its own weights, without any text",
        paper="FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs",
        authors="Kim, Henry, Fahim, Awadalla",
        year=2023,
        venue="ENLSP workshop at NeurIPS",
        arxiv="2308.09723",
        row="q-finequant",
        baseline="rtn with one scale a row",
        claim="At 4 bits at most a third is left of the divergence that one scale a row makes.",
        holds=False,
        reason="rows of the tiny model have only 96 or 288 weights, and one scale for so few does not collapse: at 4 bits "
        "it has 1.07 times the divergence of the groups chosen",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "default"

    bits: Literal[3, 4, 8] = Field(4, description="bits per weight")
    alpha: float = Field(
        0.25,
        ge=0,
        le=8,
        description="how much larger than with the smallest groups the mean squared step may be",
    )
    least: Literal[16, 32, 64, 128] = Field(32, description="smallest group tried, in input columns")
    largest: int | None = Field(
        None, ge=16, description="largest group tried, in input columns; null: the whole row"
    )

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid before sizes are chosen: one scale a row."""
        return WeightScheme(bits=self.bits)

    def schemes(
        self,
        checkpoint: Checkpoint,
        planned: Mapping[str, WeightScheme],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, WeightScheme]:
        """Choose the size of the groups of every linear, eq. (2), the rest as planned."""
        chosen: dict[str, WeightScheme] = {}
        for names in together(checkpoint, planned):
            weights = (checkpoint.tensor(f"{name}.weight").float() for name in names)
            width = checkpoint.shape(f"{names[0]}.weight")[1]
            size = group_size(weights, self.sizes(width), self.alpha)
            change = {"group_size": None if size == width else size}
            chosen.update((name, planned[name].model_copy(update=change)) for name in names)
        return chosen

    def sizes(self, width: int) -> list[int]:
        """Return the sizes to choose from for ``width`` columns, the largest first; the whole row if no other fits."""
        powers = [2**n for n in range(width.bit_length(), 3, -1) if width % 2**n == 0]
        largest = self.largest or width
        least = min(self.least, largest)
        sizes = [width, *(size for size in powers if least <= size < width)]
        return [size for size in sizes if size <= largest] or [width]

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)`` to nearest."""
        return round_to_nearest(weight, scheme)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with one scale a row at 4 bits: KL to the original, held-out text.

        The details say what groups of one size would have at the same bits per weight.
        """
        step = cls(bits=4)
        claim = bench.claim_lower(
            ours=[step],
            baseline=[RTN(bits=4, group_size=-1)],
            baseline_name="a third of rtn W4, one scale a row",
            share=1 / 3,
        )
        return claim.model_copy(update={"details": {**claim.details, **step._beside_one_size(bench)}})

    def _beside_one_size(self, bench: Bench) -> dict[str, object]:
        """Return bits per weight and KL of groups of one size, and what they would have at our bits per weight."""
        sizes = [-1, *self.sizes(math.gcd(*bench.widths.values()))[1:]]
        uniform = [RTN(bits=self.bits, group_size=size) for size in sizes]
        points = [(bench.stored_bits(step), bench.kl(step)) for step in uniform]
        bits = bench.stored_bits(self)
        return {"bits_per_weight": bits, "one_size": points, "one_size_at_our_bits": between(points, bits)}


def between(points: list[tuple[float, float]], x: float) -> float:
    """Return the value at ``x`` on the line through the logarithms of ``points``, ``(x, value)`` in order of ``x``."""
    for (a, low), (b, high) in pairwise(points):
        if x <= b:
            share = (x - a) / (b - a)
            return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return points[-1][1]


def group_size(weights: Iterable[Tensor], sizes: list[int], alpha: float) -> int:
    """Return the largest of ``sizes`` (the largest first) that is as good as the last, eq. (1) and (2).

    Parameters
    ----------
    weights
        ``(out, in)`` each, looked at one after the other; all get one size.
    """
    sums = [0.0] * len(sizes)
    rows = 0
    for weight in weights:
        rows += weight.shape[0]
        magnitude = weight.abs()
        for i, size in enumerate(sizes):
            widest = magnitude.view(weight.shape[0], -1, size).amax(-1)  # (out, groups)
            sums[i] += widest.double().square().mean(1).sum().item()
    rho = [total / max(rows, 1) for total in sums]  # (1)
    return next(size for size, value in zip(sizes, rho) if value <= (1 + alpha) * rho[-1])  # (2)
