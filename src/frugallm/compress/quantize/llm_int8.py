"""LLM.int8(): multiply in 8 bits, but keep the few input channels with outliers in 16.

Idea
----
In large models a few input channels hold values tens of times larger than the rest. One scale a token then spends its
codes on them and nothing is left for the others. They are few, so their part of the product is computed in 16 bits and
everything else in int8, with one scale a token for inputs and one scale a row for weights. Which channels those are
is seen at run time; nothing is calibrated.

Formula
-------
``X (tokens, in)`` the input of one call, ``W (out, in)`` weight, ``T`` the threshold::

    C_w = round(127 W / c_w),  c_w = max|W| of a row                                (1)
    O = channels j with |X_tj| >= T in any token t                                  (2)
    c_t = max of the |X_tj| below T                                                 (3)
    C_t = round(127 X_t / c_t) outside O                                            (4)
    Y = c_t c_w / 127^2  sum_(j not in O) C_tj C_wj  +  sum_(j in O) X_tj W'_j      (5)

with ``W' = c_w C_w / 127`` also in the second sum: the weights are stored once, in int8.

When to use it
--------------
When weights and products should be int8, no text is at hand, and rounding inputs per token costs too much. Where it
costs little, plain W8A8 is simpler and faster.

Cost
----
No calibration text, seconds. At run time the decomposition costs time: engines run it slower than plain W8A8, on small
models slower than 16 bits. FrugalLM computes it as rounded values, not with integer kernels.

Differences from the paper
--------------------------
The paper keeps the outlier columns of the weights in 16 bits. As in the authors' code at inference (bitsandbytes) they
are taken from the int8 weights here, so that the folder holds nothing twice. Also as in the code: (2) looks at all
tokens of a call together, so the result of a token depends a little on which others it is computed with; (3) counts
the values below ``T`` of outlier channels, too. Inputs outside ``O`` are rounded from the type of the activations,
where bitsandbytes casts to float16 first.

The folder says ``outliers`` in ``input_activations``, a key that is FrugalLM's own; ``frugal export --to
bitsandbytes`` writes the format that ``transformers`` loads where bitsandbytes is installed.

References
----------
Dettmers, Lewis, Belkada, Zettlemoyer: LLM.int8(), NeurIPS 2022, https://arxiv.org/abs/2208.07339;
code https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod
from frugallm.compress.quantize.grids import encode, stored
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class LLMInt8(BlockMethod):
    """Weights and inputs in 8 bits, except input channels with outliers."""

    card: ClassVar[Card] = Card(
        title="LLM.int8()",
        summary="weights and inputs in 8 bits, except the input channels that hold outliers",
        paper="LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        authors="Dettmers, Lewis, Belkada, Zettlemoyer",
        year=2022,
        venue="NeurIPS",
        arxiv="2208.07339",
        code="https://github.com/bitsandbytes-foundation/bitsandbytes",
        row="q-llm-int8",
        baseline="the same without outlier channels (threshold=0): W8A8 with one scale a token",
        claim="It loses at most half of what the same loses that rounds every channel of the input.",
        expect_fail={
            "the_folder_loads_without_us_to_equal_logits": "compressed-tensors has no outlier channels; transformers "
            "refuses the folder, and loads the bitsandbytes format that frugal export writes only with bitsandbytes"
        },
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "step"

    threshold: float = Field(
        6.0, ge=0, description="magnitude from which on an input is an outlier; 0: there are none"
    )

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return 8 bits with one float32 scale a row."""
        return WeightScheme(bits=8, group_size=None, scale_dtype="float32")

    def activations(self, name: str) -> ActivationScheme:
        """Return 8 bits per token, eq. (2) to (4)."""
        return ActivationScheme(bits=8, dynamic=True, outliers=self.threshold or None)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)``, eq. (1)."""
        scale = stored(weight.abs().amax(1, keepdim=True) / 127, scheme)  # (out, 1)
        return QuantizedTensor(encode(weight, scale, None, scheme), scale, None, scheme)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Hold it against half the KL to the original of plain W8A8 per token, held-out text."""
        return bench.claim_lower(
            ours=[cls()], baseline=[cls(threshold=0)], baseline_name="half of W8A8 per token", share=0.5
        )
