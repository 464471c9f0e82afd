"""Layer-by-layer distillation: train the codes of one block until it computes what the original block does.

Idea
----
Solvers look at one linear at a time. A block as a whole can do more: what one linear got wrong another can make up for, and
nonlinearities in between count as they are. Whatever rounded the block before, its codes are trained with gradients while
scales, zero points and all else stored stay. Only one block has gradients and an optimizer.

Formula
-------
``v`` where the weights lie on their grid, in steps of it (before rounding), ``s`` scales, ``z`` zero points, ``L`` the
original block, ``X`` and ``Y`` the hidden states in front of the stored and of the original block::

    w' = s (clamp(round(v)) - z)                                                    (1)
    minimize  mean over tokens t of  |L(w', X)_t - L(Y)_t|^2 / |L(Y)_t|^2           (2)

over ``v``; gradients pass through the rounding as if it were not there. ``v`` begins at the weight itself where it was
rounded to nearest, else in the middle of the code that a solver chose.

When to use it
--------------
At 2 to 4 bits, after ``rtn``, ``gptq``, ``awq`` or any other step that rounds to integers (``gptq:bits=3 lkd``), where
some minutes are at hand. It adds nothing to the size, and the result loads where it did before.

Cost
----
A step trains one block on ``batch`` windows: about four forwards of them. With the defaults and windows of 512 tokens
training one block of the 135M model took 21 s (one thread, beside other work; its 30 blocks were not all run): ten minutes
for all of them. Workspace: 24 bytes per weight of one block, the activations of ``batch`` windows, and the hidden
states of all windows a second time (on disk where they are large), with ``inputs`` other than ``stored`` a third.

Differences from the paper
--------------------------
LKD is the second half of ZeroQuant (``zeroquant`` has it built in); alone this rounds to nearest before it trains. Rates
are in steps of the grid, errors relative to each token's size, and the best codes on held-out windows are kept, as there.
``inputs=own`` (each block reads its own model's hidden states, so that a block also makes up for those before it) is
BRECQ's and OmniQuant's form.

References
----------
Yao, Aminabadi, Zhang, Wu, Li, He: ZeroQuant, NeurIPS 2022, https://arxiv.org/abs/2206.01861.
Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu: BRECQ, ICLR 2021, https://arxiv.org/abs/2102.05426.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, resolve_group_size
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench
    from frugallm.walk.reconstruction import Reconstructed, Reconstruction


class LKD(BlockMethod):
    """Train the codes that any step has chosen, one block at a time."""

    card: ClassVar[Card] = Card(
        title="Layer-by-layer distillation",
        summary="after any rounding, each block's codes trained to compute what the original block does",
        paper="ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
        authors="Yao, Aminabadi, Zhang, Wu, Li, He",
        year=2022,
        venue="NeurIPS",
        arxiv="2206.01861",
        baseline="gptq",
        claim="At 3 bits codes of GPTQ come closer to the original model when they are trained block by block.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "default"

    steps: int = Field(48, ge=1, le=100_000, description="training steps for each block")
    rate: float = Field(
        0.02, gt=0, le=1, description="what a first step may move a weight by, in steps of its grid"
    )
    batch: int = Field(4, ge=1, le=1024, description="windows a training step")
    inputs: Literal["stored", "original", "own"] = Field(
        "own",
        description="which model's hidden states the blocks read: as stored, the original's, each its own",
    )
    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits per weight where no other step rounds")
    group_size: int | None = Field(
        None,
        ge=-1,
        description="where no other step rounds: input columns that share one scale; -1: the whole row; null: 128 or what fits",
    )

    @property
    def reads_original(self) -> bool:
        """Whether training reads the original model's hidden states."""
        return self.inputs != "stored"

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid for linears of these widths."""
        group = resolve_group_size(self.name(), self.group_size, widths)
        return WeightScheme(bits=self.bits, group_size=group)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)`` to nearest."""
        return round_to_nearest(weight, scheme)

    def reconstruct(self, task: Reconstruction) -> Reconstructed:
        """Train the codes of one block, eq. (2)."""
        from frugallm.compress.quantize.distillation import Schedule, distill_codes

        return distill_codes(task, Schedule(self.steps, self.rate, self.batch, self.inputs))

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with GPTQ alone at 3 bits: KL to the original, held-out text."""
        solved = GPTQ(bits=3)
        return bench.claim_lower(
            ours=[solved, cls()], baseline=[solved], baseline_name="gptq W3, not trained"
        )
