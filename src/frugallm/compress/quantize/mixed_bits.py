"""Mixed bits: more bits for the linears that cost the model most, fewer for the others, at a given mean.

Idea
----
Linears are not equally sensitive to rounding. Given a budget for all of them, each gets the number of bits at which the
sum of the errors expected is least. The error expected of a linear is that of its own output, relative to that output,
times how much of such an error is found behind its block: attention may blow up a small error of queries and keys. That
factor is measured, by rounding the linear to 4 bits in the running block. The choice is made once, before the work
begins; the rounding is then done by whichever step solves.

Formula
-------
``W (out, in)`` all weights that read one input ``x``, ``m_j = E[x_j^2]``, ``Q_b`` rounding to nearest with ``b`` bits, ``h`` a
token's state behind the block, ``h'`` the same with ``Q_4(W)`` in the place of ``W``, ``n`` the number of weights::

    t_b = sum_ij (Q_b(W) - W)_ij^2 m_j / sum_ij W_ij^2 m_j                  (1)
    s = E[|h' - h|^2 / |h|^2] / t_4                                         (2)
    minimize sum s t_b over the b of all linears, with sum n b <= average sum n    (3)

(3) is solved exactly (:mod:`frugallm.compress.quantize.allocation`).

When to use it
--------------
Before a step that solves, where a size must be met or some linears do not stand the bits of the others: ``mixed_bits:
average=3.5 gptq``. The ``bits`` of that step are replaced by those chosen, its grid is kept otherwise. Alone it rounds to
nearest. vLLM loads mixed 4 and 8 bits, and on CUDA only (``choices=[4,8]``); transformers loads every mixture.

Cost
----
Before the first block: seven forwards of at most 32 calibration windows, and one rounding of every weight for each number
of bits. One block is in memory at a time, its rounded weights beside it, and one vector for each input.

Differences from the paper
--------------------------
There is no single paper. HAWQ (by curvature) and HIGGS (by the measured effect of noise in each linear on the perplexity,
and an exact allocation as in (3)) share out bits by a weighted sum of errors. (2) is a weight that a walk in bounded
memory can measure; what later blocks make of an error it does not see. On SmolLM2-135M with 4 bits on average and rounding
to nearest, 2,048 held-out tokens, KL is 0.66 nats with (2), 0.98 with ``s = 1``, 0.87 with the share of the stream that the
linear's sublayer makes, and 0.93 with 4 bits everywhere. (1) uses the diagonal of the input's second moment and rounding
to nearest, whoever rounds in the end: only ratios between linears and between numbers of bits matter. The field calls it
mixed precision, a name that means something else in training.

References
----------
Malinovskii, Panferov, Ilin, Guo, Richtarik, Alistarh: HIGGS, NAACL 2025, https://arxiv.org/abs/2411.17525;
Dong, Yao, Gholami, Mahoney, Keutzer: HAWQ, ICCV 2019, https://arxiv.org/abs/1905.03696.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from frugallm.compress.contract import BlockMethod, resolve_group_size, together
from frugallm.compress.quantize.allocation import allocate
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.solvers import output_energy
from frugallm.errors import ParameterError
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench
    from frugallm.models.checkpoint import Checkpoint


class MixedBits(BlockMethod):
    """Choose the bits of every linear under a budget."""

    card: ClassVar[Card] = Card(
        title="Mixed bits",
        summary="bits of every linear chosen under a budget, by what its rounding costs; any solver rounds",
        baseline="rtn with the same bits everywhere",
        claim="At a mean of 4 bits the model stays closer to the original than with 4 bits everywhere.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "default"
    scheme_needs: ClassVar[frozenset[str]] = frozenset({"mean_square", "gain"})

    average: float = Field(4.0, ge=2, le=8, description="budget: mean bits of a code; scales come on top")
    megabytes: float | None = Field(
        None,
        gt=0,
        description="budget in 10^6 bytes for all that is stored of these linears, instead of average",
    )
    choices: tuple[Literal[2, 3, 4, 5, 6, 7, 8], ...] = Field(
        (2, 3, 4, 5, 6, 8), description="numbers of bits to choose from"
    )
    group_size: int | None = Field(
        None,
        ge=-1,
        description="columns that share one scale where no other step rounds; -1: the row; null: 128 or what fits",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.choices:
            raise ValueError("choices is empty: give at least one number of bits")
        if self.megabytes is None and self.average < min(self.choices):
            raise ValueError(
                f"average {self.average:g} is below the fewest bits in choices, {min(self.choices)}"
            )
        return self

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid before bits are chosen."""
        group = resolve_group_size(self.name(), self.group_size, widths)
        return WeightScheme(bits=min(self.choices), group_size=group)

    def schemes(
        self,
        checkpoint: Checkpoint,
        planned: Mapping[str, WeightScheme],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, WeightScheme]:
        """Choose the bits of every linear, eq. (3), the rest as planned."""
        bits = sorted(set(self.choices))
        parts = together(checkpoint, planned)
        forms = [[_with_bits(planned, names, b) for b in bits] for names in parts]
        errors = [self._errors(checkpoint, tried, statistics) for tried in forms]
        costs = [[self._cost(checkpoint, one) for one in tried] for tried in forms]
        budget = self._budget(checkpoint, planned)
        found = allocate(torch.tensor(errors, dtype=torch.float64), costs, budget)
        if found is None:
            least = sum(row[0] for row in costs)
            raise ParameterError(
                f"{self.name()}: {budget / 1e6:g} megabytes are too few: with {bits[0]} bits everywhere it is {least / 1e6:g}",
                "Raise megabytes, or allow fewer bits with choices",
            )
        return {name: scheme for tried, i in zip(forms, found) for name, scheme in tried[i].items()}

    def _cost(self, checkpoint: Checkpoint, form: Mapping[str, WeightScheme]) -> int:
        """Return what counts against the budget: bits of codes, or bytes of everything."""
        shapes = {name: checkpoint.shape(f"{name}.weight") for name in form}
        if self.megabytes is not None:
            return sum(scheme.stored_bytes(*shapes[name]) for name, scheme in form.items())
        return sum(scheme.bits * shapes[name][0] * shapes[name][1] for name, scheme in form.items())

    def _budget(self, checkpoint: Checkpoint, planned: Mapping[str, WeightScheme]) -> int:
        if self.megabytes is not None:
            return int(self.megabytes * 1e6)
        shapes = [checkpoint.shape(f"{name}.weight") for name in planned]
        return int(self.average * sum(rows * width for rows, width in shapes))

    def _errors(
        self,
        checkpoint: Checkpoint,
        tried: list[dict[str, WeightScheme]],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> list[float]:
        """Return ``s t_b`` of linears that share an input, for each of the forms ``tried``."""
        lost, size = [0.0] * len(tried), 0.0
        for name in tried[0]:
            weight = checkpoint.tensor(f"{name}.weight").float()
            square = statistics[name]["mean_square"]
            size += output_energy(weight, square)
            for i, form in enumerate(tried):
                lost[i] += output_energy(
                    round_to_nearest(weight, form[name]).on_grid() - weight, square
                )  # (1)
        gain = float(statistics[next(iter(tried[0]))]["gain"])  # (2)
        return [gain * error / max(size, 1e-30) for error in lost]

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)`` to nearest."""
        return round_to_nearest(weight, scheme)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with 4 bits everywhere, same groups, at the same mean: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls(average=4)], baseline=[RTN(bits=4)], baseline_name="rtn W4, same groups"
        )


def _with_bits(
    planned: Mapping[str, WeightScheme], names: tuple[str, ...], bits: int
) -> dict[str, WeightScheme]:
    return {name: planned[name].model_copy(update={"bits": bits}) for name in names}
