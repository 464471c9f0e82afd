"""OBC: take the weight that costs least, let the others make up for it, and go on with the next.

Idea
----
Optimal Brain Surgeon, exactly, for every row of a layer: of all weights still free, round (or make zero) the one whose
going costs the layer's output least when the others are moved so as to make up for it as well as they can; then the
next. Rows share nothing but the inputs, so each keeps an inverse of its own. The same steps quantize (OBQ), prune
(ExactOBS), or prune and then round what is left. ``gptq`` and ``sparsegpt`` are what becomes of this when all rows take
their weights in one order.

Formula
-------
``w (in,)`` one row, ``X (tokens, in)`` inputs, ``H = X^T X + damp mean(diag) I``, ``F`` the entries still free,
``A = (H_FF)^-1``::

    p = argmin_j (w_j - w'_j)^2 / A_jj      w'_j = quant(w_j), or 0 to prune      (1)
    w <- w - A_:p (w_p - w'_p) / A_pp                                             (2)
    A <- A - A_:p A_p: / A_pp               and p is no longer in F               (3)

An entry that (2) has pushed off the grid, by more than half a step, goes before all others. Pruning a share of the whole
weight follows (1) to (3) in every row to its end, then gives each next zero to the row in which it costs least; with
``n:m`` a group of ``m`` is closed when ``n`` of it are gone.

When to use it
--------------
For zeros, with ``bits=null,sparsity=0.5``, in layers chosen with ``only``: in rows of six linears of SmolLM2-135M the squared
error of the output was 0.27 to 0.74 of that of ``sparsegpt``. With ``bits=4,sparsity=0.5`` what stays is rounded as well.
For rounding alone ``gptq`` is better as well as faster: at 3 bits in groups of 64, in rows of eight linears, the error was
0.2 to 0.7 of that of rounding to nearest, but 1.1 to 5.4 times that of ``gptq``. The cheapest weights are those of inputs
that vary little. They go first, and nothing is left to make up for those of the large inputs; with ``act_order``
``gptq`` begins with these.

Cost
----
One forward of the calibration windows per block, and ``O(out in^3)`` per linear, where ``gptq`` has ``O(out in^2)``: on
one core 10 ms for a row of 576 inputs and 0.1 s for one of 1536. That is 16 s for q, k, v and o of a block of
SmolLM2-135M, two minutes for the whole block and an hour for the model; a run says so beforehand. Pruning and rounding
takes twice that. Workspace: 0.2 GB, and 28 bytes per entry of the largest ``H``.

Differences from the paper
--------------------------
Ranges are those of ``gptq``: per group or row, fixed beforehand, with ``search="mse"`` weighted by the inputs' mean
square. ``damp`` is 0.01 as in ``gptq``; in the authors' code it is 0, and the identity is added where ``H`` cannot be
inverted. Zeros are dealt out over the rows as in the paper (Algorithm 2); the authors' code sorts all costs, which is
the same where costs grow along every row. Once the zeros are known, the values of what stays are solved for instead of
carried along. Pruned blocks and different shares for each layer (a database and SPDY) are not there. Inputs are those of
the model as stored up to the linears before this one in the same block.

References
----------
Frantar, Singh, Alistarh: Optimal Brain Compression, NeurIPS 2022, https://arxiv.org/abs/2208.11580;
code https://github.com/IST-DASLab/OBC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from frugallm.compress.contract import PruneMethod, resolve_group_size
from frugallm.compress.prune.unstructured.masks import Sparsity, pattern_share
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import fit
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.solvers_greedy import prune_greedily, quantize_greedily
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench

#: What one core was seen to do, in ``out in^3`` a second.
SPEED = 2e10
#: Seconds from which on a run says beforehand how long it will take.
LONG = 60


class OBC(PruneMethod):
    """Round, prune, or both, one weight at a time, the cheapest first."""

    card: ClassVar[Card] = Card(
        title="OBC",
        summary="in every row the weight that costs least is rounded or pruned next; the others make up for it",
        paper="Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning",
        authors="Frantar, Singh, Alistarh",
        year=2022,
        venue="NeurIPS",
        arxiv="2208.11580",
        code="https://github.com/IST-DASLab/OBC",
        row="q-obc",
        baseline="rtn",
        claim="With attention at 3 bits, one scale a row, the model stays closer to the original than with rounding.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "step"
    solve_needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})
    by_rows: ClassVar[bool] = False

    sparsity: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of every linear's weights that become zero; 0: none, or as n:m says",
    )
    damp: float = Field(0.01, ge=0, le=1, description="added to the diagonal of H, as a fraction of its mean")
    bits: Literal[2, 3, 4, 5, 6, 7, 8] | None = Field(
        4, description="bits of the weights that stay; null: they are not rounded"
    )
    group_size: int | None = Field(
        None,
        ge=-1,
        description="input columns that share one scale; -1: the whole row; null: 128 or what fits",
    )
    symmetric: bool = Field(True, description="no zero point")
    search: Literal["minmax", "mse"] = Field("mse", description="how a group's range is chosen")

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.prunes and not self.rounds:
            raise ValueError("nothing to do without bits and without sparsity; give one of them, or both")
        return self

    @property
    def target(self) -> Sparsity:
        """Share and pattern of the zeros."""
        share = self.sparsity or pattern_share(self.pattern) or 0.0
        return Sparsity(share=share, pattern=self.pattern)

    @property
    def prunes(self) -> bool:
        """Whether weights become zero."""
        return self.target.share > 0

    @property
    def rounds(self) -> bool:
        """Whether the weights that stay are rounded."""
        return self.bits is not None

    def weights(self, widths: Mapping[str, int]) -> WeightScheme | None:
        """Return the grid for linears of these widths; ``None`` where nothing is rounded."""
        if self.bits is None:
            return None
        group = resolve_group_size(self.name(), self.group_size, widths)
        return WeightScheme(bits=self.bits, symmetric=self.symmetric, group_size=group)

    def notes(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        """Say how long it will take where that is long."""
        passes = self.prunes + self.rounds
        seconds = {name: passes * out * width**3 / SPEED for name, (out, width) in shapes.items()}
        total = sum(seconds.values())
        if total < LONG:
            return ()
        worst = max(seconds, key=seconds.__getitem__)
        return (
            f"{self.name()}: about {total / 60:.0f} minutes of one core for {len(seconds)} linears, "
            f"{seconds[worst]:.0f} s of them for {worst}; only chooses linears",
        )

    def prune(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Prune ``weight`` ``(out, in)``, eq. (1) to (3)."""
        return prune_greedily(weight, statistics["second_moment"], self.target, damp=self.damp)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)``, eq. (1) to (3); prune it first if that is asked for."""
        h, pruned = statistics["second_moment"], statistics.get("pruned")
        if self.prunes:
            weight = self.prune(weight, statistics)
            pruned = weight == 0
        scale, zero = fit(weight, scheme, self.search, importance=h.diagonal())
        return quantize_greedily(weight, h, scale, zero, scheme, damp=self.damp, pruned=pruned)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with rounding the attention's linears at 3 bits on the same grid: KL to the original, held-out text."""
        same: dict[str, Any] = {"bits": 3, "group_size": -1, "search": "minmax", "only": ("*att*n*",)}
        ours, grid = [cls(**same)], "W3 of the same linears, one scale a row"
        claim = bench.claim_lower(ours=ours, baseline=[RTN(**same)], baseline_name=f"rtn {grid}")
        # What the cheapest first gains or loses against one order for all rows.
        gptq = bench.claim_lower(ours=ours, baseline=[GPTQ(**same)], baseline_name=f"gptq {grid}")
        details = {"gptq": gptq.baseline_value, "gptq_interval": gptq.details["interval"]}
        return claim.model_copy(update={"details": {**claim.details, **details}})
