"""QLLM: take the largest input channels apart, let similar ones share a channel, then correct with a low-rank part.

Idea
----
A few input channels are so large that a scale which covers them leaves nothing for the others; at 4 bits that ruins the
model. A channel can be split into equal parts, each read by a copy of its weight column: nothing changes but the largest
value. To keep the width, as many other channels are given up: those that resemble each other most, in their values and in
their weights, share one. How far to split is chosen for every site by the error of its output. At last each block is
trained a little, through a low-rank change of its weights, to compute what the original block does.

Formula
-------
``x (in,)`` inputs, ``w_j`` columns of all weights that read them, ``t`` the threshold::

    T_j = ceil(max|x_j| / t),    x_j w_j = sum over T_j parts of (x_j / T_j) w_j          (1)
    d(i, j) = |x_i - x_j|^2 |w_i - w_j|^2 / 4                                             (2)
    x_i w_i + x_j w_j  ~  (x_i + x_j) / 2 (w_i + w_j)    for the pairs of least d          (3)
    t = argmin over t of |Q(x) W - x W|^2                                                 (4)
    W' = round(W + A B),   A (out, rank), B (rank, in) trained for the block's output      (5)

As many pairs are joined in (3) as parts are added in (1); pairs go from even to odd channels, split ones excluded. ``Q``
rounds every token in the new channels.

When to use it
--------------
For 4-bit inputs by token on models with outlier channels, where a rotation is not wanted. At 8 bits rounding by token does
as well without.

Cost
----
One extra product of sampled tokens for each of ``candidates`` thresholds and each site; a training step as with
``zeroquant``. With the defaults one block of the 135M model took 27 s, 23 of them for the correction (one thread, beside
other work; its 30 blocks were not all run): a quarter of an hour for all of them. No engine has a kernel for split
channels: the result is read by FrugalLM only, which computes the rounded values and is no faster than the original.

Differences from the paper
--------------------------
Blocks are trained one at a time; the paper trains several together (four in its scripts), so that later blocks may make up
for earlier ones. Here they do so as each block reads the hidden states of the model as stored and is held to those of the
original. Thresholds are compared by (4) with weights as they are, on sampled tokens, not with rounded weights; the paper
leaves the input of the output projection as it is, here it is searched like the others. Inputs are rounded on symmetric
grids, the paper's have a zero point. Only ``A`` and ``B`` are trained, at a rate in steps of the weights' grid; scales stay
those of the weights before. What is kept is best on windows that were held out.

References
----------
Liu, Gong, Wei, Cai, Zhuang: QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models, ICLR 2024,
https://arxiv.org/abs/2310.08041; code https://github.com/ModelTC/QLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, resolve_group_size
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.formats.channels import Reassembly
from frugallm.formats.extras import Channels
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.formats.rounded_inputs import round_activations
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench
    from frugallm.walk.reconstruction import Reconstructed, Reconstruction


class QLLM(BlockMethod):
    """Split and share input channels, round inputs by token, correct blocks with a low-rank part."""

    card: ClassVar[Card] = Card(
        title="QLLM",
        summary="large input channels split, similar ones shared, then a low-rank correction block by block",
        paper="QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models",
        authors="Liu, Gong, Wei, Cai, Zhuang",
        year=2024,
        venue="ICLR",
        arxiv="2310.08041",
        code="https://github.com/ModelTC/QLLM",
        row="q-qllm",
        baseline="W4A4 by token without splitting (ratio=0), not trained",
        claim="With 4-bit weights and inputs, splitting and sharing channels alone stays closer to the original.",
        expect_fail={
            "the_folder_loads_without_us_to_equal_logits": "no other program knows split and shared channels; plain "
            "transformers refuses the folder",
            "errors_are_finite_and_small_at_8_bits": "columns of channels that share one are replaced by their mean, at "
            "any number of bits",
        },
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "step"
    keeps_zeros: ClassVar[bool] = False

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits per weight")
    input_bits: Literal[4, 5, 6, 7, 8] = Field(4, description="bits of inputs, one scale a token")
    group_size: int = Field(
        -1, ge=-1, description="input columns that share one scale of the weights; -1: the whole row"
    )
    symmetric: bool = Field(False, description="no zero point")
    ratio: float = Field(
        0.2, ge=0, le=0.5, description="parts that may be added, as a share of the channels; 0: none"
    )
    candidates: int = Field(32, ge=1, le=1000, description="thresholds that are compared at each site")
    rank: int = Field(4, ge=1, le=4096, description="rank of the correction")
    steps: int = Field(32, ge=0, le=100_000, description="training steps for each block; 0: not corrected")
    rate: float = Field(0.02, gt=0, le=1, description="what a first step moves the factors by")
    batch: int = Field(4, ge=1, le=1024, description="windows a training step")

    @property
    def reconstructs(self) -> bool:
        """Whether blocks are corrected."""
        return self.steps > 0

    @property
    def reads_original(self) -> bool:
        """The correction is held to the original model's hidden states."""
        return self.reconstructs

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return the grid for linears of these widths, with columns of their own."""
        group = resolve_group_size(self.name(), self.group_size, widths)
        return WeightScheme(
            bits=self.bits, symmetric=self.symmetric, group_size=group, extras=(Channels.kind,)
        )

    def activations(self, name: str) -> ActivationScheme:
        """Return one scale a token, over channels that are split and shared."""
        return ActivationScheme(bits=self.input_bits, reassembled=True)

    def input_needs(self, scheme: ActivationScheme) -> frozenset[str]:
        """Channel maxima, sampled tokens, and the moment of the weights that read them."""
        return frozenset({"absmax", "sample", "weight_moment"})

    def input_parameters(
        self, scheme: ActivationScheme, statistics: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return where each channel goes, (1) to (4)."""
        absmax, sample, moment = (statistics[name] for name in ("absmax", "sample", "weight_moment"))
        return search(absmax, sample, moment, scheme, self.ratio, self.candidates).tensors()

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round the columns of ``weight`` ``(out, in)`` that read the new channels."""
        reassembly = Reassembly.of(statistics, weight.shape[1])
        return round_to_nearest(reassembly.columns(weight), scheme).plus(Channels(reassembly))

    def reconstruct(self, task: Reconstruction) -> Reconstructed:
        """Train a low-rank change of each weight, (5)."""
        from frugallm.compress.quantize.distillation import Schedule, distill_low_rank

        return distill_low_rank(task, self.rank, Schedule(self.steps, self.rate, self.batch, "own"), _columns)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with no splitting, both untrained: KL to the original, held-out text.

        The details say what the correction gives beside that.
        """
        apart, naive = cls(steps=0), cls(steps=0, ratio=0.0)
        claim = bench.claim_lower(
            ours=[apart], baseline=[naive], baseline_name="W4A4 by token, channels as they are"
        )
        corrected = bench.evaluate(cls())
        ends = bench.compare(corrected, bench.evaluate(apart))
        mean = sum(corrected.kl_per_window) / len(corrected.kl_per_window)
        details = {"corrected": mean, "correction_interval": list(ends) if ends else None}
        return claim.model_copy(update={"details": {**claim.details, **details}})


def _columns(weight: Tensor, stored: QuantizedTensor) -> Tensor:
    """Return ``weight`` ``(out, in)`` in the columns in which it is stored."""
    (channels,) = (extra for extra in stored.extras if isinstance(extra, Channels))
    return channels.reassembly.columns(weight)


def search(
    absmax: Tensor, sample: Tensor, moment: Tensor, scheme: ActivationScheme, ratio: float, candidates: int
) -> Reassembly:
    """Return the best reassembly of the thresholds tried, eq. (4); none at all is one of them.

    Parameters
    ----------
    absmax
        ``(in,)`` channel maxima.
    sample
        ``(tokens, in)`` some inputs.
    moment
        ``(in, in)`` ``W^T W`` of all weights that read them.
    """
    width = len(absmax)
    cost = distances(sample, moment)
    best = Reassembly.none(width)
    least = output_error(sample, best, moment, scheme)
    low, high = smallest_threshold(absmax, int(ratio * width)), float(absmax.max())
    for step in range(candidates):
        reassembly = reassemble(absmax, low + (high - low) * step / candidates, cost)
        if reassembly is not None:
            found = output_error(sample, reassembly, moment, scheme)
            if found < least:
                best, least = reassembly, found
    return best


def parts_of(absmax: Tensor, threshold: float) -> Tensor:
    """Return into how many parts each channel is split, ``(in,)`` int64, eq. (1)."""
    return (absmax.double() / max(threshold, 1e-30)).ceil().clamp(min=1).long()


def smallest_threshold(absmax: Tensor, most: int) -> float:
    """Return the smallest threshold, to a thousandth of the largest value, at which at most ``most`` parts are added."""
    low, high = 0.0, float(absmax.max())
    while high - low > 1e-3 * float(absmax.max()) and high > 0:
        middle = (low + high) / 2
        fits = int((parts_of(absmax, middle) - 1).sum()) <= most
        low, high = (low, middle) if fits else (middle, high)
    return high


def distances(sample: Tensor, moment: Tensor) -> Tensor:
    """Return what it costs that two channels share one, ``(in, in)``, eq. (2)."""
    return _apart(sample.T @ sample / max(len(sample), 1)) * _apart(moment) / 4


def _apart(moment: Tensor) -> Tensor:
    """Return ``|a_i - a_j|^2`` of all pairs of columns of ``A`` from ``A^T A`` ``(in, in)``."""
    diagonal = moment.diagonal()
    return (diagonal[:, None] + diagonal[None, :] - 2 * moment).clamp(min=0)


def reassemble(absmax: Tensor, threshold: float, cost: Tensor | None) -> Reassembly | None:
    """Split what is larger than ``threshold``, and let as many channels be shared as parts are added.

    Parameters
    ----------
    cost
        ``(in, in)``, eq. (2); ``None``: nothing is shared, and there are more columns than before.

    Returns
    -------
    Reassembly or None
        ``None`` where not enough channels are left to be shared.
    """
    width = len(absmax)
    parts = parts_of(absmax, threshold)
    added = int((parts - 1).sum())
    groups = torch.arange(width)
    if added and cost is not None:
        whole = (parts == 1).nonzero()[:, 0]
        even, odd = whole[whole % 2 == 0], whole[whole % 2 == 1]
        if len(even) < added or not len(odd):
            return None
        least, partner = cost[even][:, odd].min(1)
        given_up = least.argsort(stable=True)[:added]
        groups[even[given_up]] = odd[partner[given_up]]
    groups = groups.unique(return_inverse=True)[1]
    return Reassembly(groups.to(torch.int32), parts.to(torch.int16))


def output_error(sample: Tensor, reassembly: Reassembly, moment: Tensor, scheme: ActivationScheme) -> float:
    """Return ``|(Q(x) - x) W^T|^2`` of the sampled inputs ``(tokens, in)``, eq. (4)."""
    moved = (round_activations(sample, scheme, reassembly.tensors()) - sample).double()
    return float(((moved @ moment.double()) * moved).sum())
