"""Rounded inputs: the inputs of linears go to few bits with one scale a token. The baseline of every W·A scheme.

Idea
----
Engines multiply faster where both factors are integers. A token's inputs are rounded when they come, on a grid that
covers its largest value; nothing has to be known beforehand. Weights are rounded by another step of the recipe, of any
kind, or to 8 bits where there is none.

Formula
-------
``x (in,)`` one token's input of a linear, ``b`` bits::

    s = max |x| / ((2^b - 1) / 2)                                    (1)
    x' = s clamp(round(x / s), -2^(b-1), 2^(b-1) - 1)                (2)

With ``scale=static``, ``max |x|`` is that of all calibration tokens and channels, and ``s`` is stored.

When to use it
--------------
``inputs:bits=8`` beside any solver, for engines with int8 kernels. At 4 bits alone it destroys the model, since a few
channels are much larger than the others: put ``rotate`` in front of it. Static scales want ``smoothquant`` instead.

Cost
----
None. Static scales need calibration text, and one forward of it.

Differences from the paper
--------------------------
There is no single paper.

References
----------
The grids are those of compressed-tensors (https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class Inputs(BlockMethod):
    """Round the inputs of linears at run time, with any step for their weights."""

    card: ClassVar[Card] = Card(
        title="Rounded inputs",
        summary="the baseline of rounded activations: one scale a token, beside any step that rounds weights",
        baseline="the same with one static scale a tensor",
        claim="In 8 bits one scale a token keeps the model closer to the original than one static scale a tensor.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "default"

    bits: Literal[4, 5, 6, 7, 8] = Field(8, description="bits per input value")
    scale: Literal["token", "static"] = Field(
        "token", description="one scale a token, at run time, or one a tensor, from calibration text"
    )

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return 8 bits with one float32 scale a row, for linears that no other step rounds."""
        return WeightScheme(bits=8, group_size=None, scale_dtype="float32")

    def activations(self, name: str) -> ActivationScheme:
        """Return how inputs are rounded, eq. (1) and (2)."""
        return ActivationScheme(bits=self.bits, dynamic=self.scale == "token")

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)`` to 8 bits."""
        return round_to_nearest(weight, scheme)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with a static scale a tensor in 8 bits: KL to the original, held-out text."""
        return bench.claim_lower(
            ours=[cls()], baseline=[cls(scale="static")], baseline_name="W8A8, one static scale a tensor"
        )
