"""ZeroQuant: weights in groups, inputs by token, and a distillation that sees one block at a time.

Idea
----
One scale for a whole weight, or for the inputs of all tokens, must cover the largest value in it. ZeroQuant gives every
group of weights and every token a scale of its own, and stores the feed-forward weights, which are most of a model and
bear it best, in 4 bits, those of attention in 8. What rounding still costs is won back block by block: the rounded block
and the original read the same hidden states, and the weights are trained until both compute the same. Only that one block
has gradients and an optimizer, and any text will do.

Formula
-------
``w`` a group of a weight, ``x`` the inputs of one token, ``b`` bits::

    s_w = max|w| / ((2^b - 1) / 2),    s_x = max|x| / 127.5                        (1)
    w' = s_w clamp(round(w / s_w)),    x' = s_x clamp(round(x / s_x))              (2)

``L`` the original block, ``L'`` the rounded one, ``X`` hidden states (layer-by-layer distillation, LKD)::

    minimize  mean over tokens t of  |L'(X)_t - L(X)_t|^2 / |L(X)_t|^2             (3)

over the weights ``w`` of ``L'``; gradients pass through the rounding in (2) as if it were not there.

When to use it
--------------
For W4A8 and W8A8 where a little text and some minutes are at hand. At 8 bits throughout there is nothing to win back:
``steps=0``. A later step may round instead (``zeroquant gptq``): its codes are trained then. After any other step that
rounds, ``lkd`` does (3) alone.

Cost
----
A step trains one block on ``batch`` windows: about four forwards of them. With the defaults and windows of 512 tokens
training one block of the 135M model took 21 s after ``gptq``, without rounded inputs (one thread, beside other work; its 30
blocks were not all run): some ten minutes for all of them. Workspace: 24 bytes per weight of one block, the activations of
``batch`` windows, and the hidden states of all windows a second time (on disk where they are large), with
``inputs=original`` a third.

Differences from the paper
--------------------------
The paper trains the weights themselves; here what is trained is measured in steps of each weight's own grid (``rate``), so
that one rate fits all layers and bits, and scales stay. The error of each token is taken relative to its size (3), the
paper takes plain squares: hidden states of the first token are some thousand times larger than others in models like these
and would outweigh them. ``X`` are hidden states of the model as stored; the paper's formula has those of the original, which is
``inputs=original``. Norms and biases are not trained. The codes kept are those with the least error on windows that were
held out, which may be the first. One text calibrates all methods here; the paper's point that random text does as well is
not checked. Fused kernels are a matter of the engine that loads the result.

References
----------
Yao, Aminabadi, Zhang, Wu, Li, He: ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale
Transformers, NeurIPS 2022, https://arxiv.org/abs/2206.01861; code https://github.com/microsoft/DeepSpeed (compression).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, resolve_group_size
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench
    from frugallm.models.checkpoint import Checkpoint
    from frugallm.walk.reconstruction import Reconstructed, Reconstruction


class ZeroQuant(BlockMethod):
    """Weights by groups, inputs by token, and layer-by-layer distillation."""

    card: ClassVar[Card] = Card(
        title="ZeroQuant",
        summary="weights by groups and inputs by token, then each block trained to compute what the original does",
        paper="ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
        authors="Yao, Aminabadi, Zhang, Wu, Li, He",
        year=2022,
        venue="NeurIPS",
        arxiv="2206.01861",
        code="https://github.com/microsoft/DeepSpeed",
        row="q-zeroquant",
        baseline="the same bits with one scale a row and static inputs, not trained",
        claim="With scales by group and token, and trained block by block, W4/8A8 loses less than with coarse scales.",
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "default"

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits per weight of feed-forward linears")
    attention_bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(
        8, description="bits per weight of attention linears"
    )
    group_size: int | None = Field(
        None,
        ge=-1,
        description="input columns that share one scale; -1: the whole row; null: 128 or what fits",
    )
    activation: Literal["token", "static"] = Field(
        "token", description="one input scale a token at run time, or one a tensor, fixed beforehand"
    )
    steps: int = Field(48, ge=0, le=100_000, description="training steps for each block; 0: not trained")
    rate: float = Field(
        0.02, gt=0, le=1, description="what a first step may move a weight by, in steps of its grid"
    )
    batch: int = Field(4, ge=1, le=1024, description="windows a training step")
    inputs: Literal["stored", "original"] = Field(
        "stored",
        description="which model's hidden states both blocks read: as stored so far, or the original's",
    )

    @property
    def reconstructs(self) -> bool:
        """Whether blocks are trained."""
        return self.steps > 0

    @property
    def reads_original(self) -> bool:
        """Whether training reads the original model's hidden states."""
        return self.reconstructs and self.inputs == "original"

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid of feed-forward linears."""
        group = resolve_group_size(self.name(), self.group_size, widths)
        return WeightScheme(bits=self.bits, group_size=group)

    def schemes(
        self,
        checkpoint: Checkpoint,
        planned: Mapping[str, WeightScheme],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, WeightScheme]:
        """Return the grid of every linear: attention has bits of its own."""
        attention = attention_linears(checkpoint)
        wide = {"bits": self.attention_bits}
        return {n: s.model_copy(update=wide) if n in attention else s for n, s in planned.items()}

    def activations(self, name: str) -> ActivationScheme:
        """Return 8 bits, per token or static."""
        return ActivationScheme(bits=8, dynamic=self.activation == "token")

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)`` to nearest, eq. (1) and (2)."""
        return round_to_nearest(weight, scheme)

    def reconstruct(self, task: Reconstruction) -> Reconstructed:
        """Train the codes of one block, eq. (3)."""
        from frugallm.compress.quantize.distillation import Schedule, distill_codes

        return distill_codes(task, Schedule(self.steps, self.rate, self.batch, self.inputs))

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with coarse scales at the same bits: KL to the original, held-out text.

        The details say what the scales alone do, and what training makes of that.
        """
        scales, coarse = cls(steps=0), cls(steps=0, group_size=-1, activation="static")
        claim = bench.claim_lower(
            ours=[cls()], baseline=[coarse], baseline_name="W4/8 A8, one scale a row, static inputs"
        )
        trained, rounded = bench.evaluate(cls()), bench.evaluate(scales)
        ends = bench.compare(trained, rounded)
        mean = sum(rounded.kl_per_window) / len(rounded.kl_per_window)
        details = {"scales_alone": mean, "training_interval": list(ends) if ends else None}
        return claim.model_copy(update={"details": {**claim.details, **details}})


def attention_linears(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the full names of all linears of attention."""
    family, config = checkpoint.family, checkpoint.config
    return frozenset(
        f"{family.block(index)}.{path}"
        for index in range(config.num_hidden_layers)
        for sub in family.graph(config, index)
        if sub.attention
        for site in sub.sites
        for path in site.linears
    )
