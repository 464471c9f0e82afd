"""BitNet: train a model from the start whose weights are ternary or binary in every forward.

Idea
----
A trained model does not survive weights of one bit; a model that has never seen any others learns with them. Every
linear of the blocks becomes a BitLinear: it normalizes and rounds its input to 8 bits, and takes the sign, or the
nearest of -1, 0 and 1, of a weight that is kept in float32 for the optimizer alone. Gradients pass the rounding as if it
were not there. What is stored are the codes and one scale a matrix.

Formula
-------
``W (out, in)`` latent weight, ``x (tokens, in)`` input, ``RMS`` the root mean square of a token::

    c = max |x / RMS(x) g|,   x' = clamp(round(127 x / RMS(x) g / c), -128, 127) c / 127       (1)
    s = mean |W|,             W' = s clamp(round(W / s), -1, 1)         ternary (b1.58)         (2)
    s = mean |W|,             W' = s sign(W - mean W)                   binary (BitNet)         (3)
    y = x' W'^T,              dL/dW = dL/dW',   dL/dx = dL/dx' through the norm                 (4)

When to use it
--------------
To train a new model whose matrices are to be as small as they can be. Never on a trained one: its weights mean nothing
any more once they are ternary (the claim measures that too). Below a few billion parameters expect a higher loss than in
float; the papers reach it from 3 billion on.

Cost
----
A training run. A step takes some 1.5 times that of the plain model on a CPU: the latent weights are rounded each time.
Memory: float32 weights, gradients and two moments, 16 bytes per weight.

Differences from the paper
--------------------------
The norm inside each BitLinear is an RMSNorm with gains for both kinds; BitNet's is a LayerNorm without. It takes the
place of the norms before attention and MLP: their gains stay one, and a normalized input normalized again is itself, so
nothing is normalized twice. ``norm=false`` leaves it out, and the block's norms as they are. The scale is rounded as it
is stored (its inverse in bf16) in training already, so that the trained model and the folder are one function. The
binary kind's inputs are rounded like the ternary's (b1.58), not to the range ``+-(128 - eps)``, and never shifted before
a non-linearity. Latent weights are float32, not mixed precision. Weight decay ends and the learning rate drops to two
thirds half way (the authors' training notes). Binary weights are stored with one bit in a layout of our own.

References
----------
Wang et al.: BitNet: Scaling 1-bit Transformers for Large Language Models, 2023, https://arxiv.org/abs/2310.11453;
Ma et al.: The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, 2024, https://arxiv.org/abs/2402.17764;
code and training notes https://github.com/microsoft/unilm/tree/master/bitnet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from frugallm.errors import ModelError
from frugallm.formats import bitnet_layout
from frugallm.formats.quantized_tensor import QuantizedTensor
from frugallm.method import Card, Claim
from frugallm.training.contract import TrainMethod
from frugallm.training.layouts import Layout
from frugallm.training.linears import block_linears, norms_before
from frugallm.training.straight_through import straight_through

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from frugallm.evaluate.bench import Bench
    from frugallm.models.family import Family

Kind = Literal["ternary", "binary"]
#: Share of the learning rate from the second half on, as 8e-4 to 1.2e-3 in the authors' notes.
SECOND_STAGE = 2 / 3
WARM_UP = 0.05


class BitNet(TrainMethod):
    """Train with ternary or binary weights and 8-bit inputs, from the start."""

    card: ClassVar[Card] = Card(
        title="BitNet",
        summary="trained from the start with ternary (b1.58) or binary weights and 8-bit inputs",
        paper="BitNet: Scaling 1-bit Transformers for Large Language Models",
        authors="Wang, Ma, Dong, Huang, Wang, Ma, Yang, Wang, Wu, Wei",
        year=2023,
        venue="arXiv",
        arxiv="2310.11453",
        code="https://github.com/microsoft/unilm/tree/master/bitnet",
        row="q-bitnet",
        baseline="a float model whose weights are made ternary after training",
        claim="Trained from scratch with ternary weights a model predicts better than with binary ones, and both far "
        "better than a float model made ternary after training.",
        holds=False,
        reason="at 76 thousand weights and 300 steps both kinds beat a float model made ternary whatever the seed, but "
        "ternary beats binary for two seeds of three only, by less than seeds differ",
    )
    begins: ClassVar[Literal["model", "scratch", "either"]] = "scratch"
    learning_rate: ClassVar[float] = 3e-3

    weights: Literal["ternary", "binary"] = Field(
        "ternary", description="b1.58, or the first BitNet's one bit"
    )
    norm: bool = Field(
        True, description="normalize the input inside every linear, in place of the block's norms"
    )
    weight_decay: float = Field(
        0.1, ge=0, le=1, description="of the latent weights, in the first half of training"
    )
    two_stages: bool = Field(
        True, description="drop the learning rate to two thirds and end weight decay half way"
    )

    def rewrite(self, student: PreTrainedModel, family: Family) -> None:
        """Make every linear of the blocks a BitLinear."""
        linears = block_linears(student, family)
        fields = 4 if self.weights == "ternary" else 8
        for name, linear in linears.items():
            if linear.out_features % fields:
                raise ModelError(
                    f"bitnet: {name} has {linear.out_features} outputs, no multiple of {fields}",
                    "Packed codes need that; choose other widths",
                )
            student.set_submodule(name, BitLinear(linear, self.weights, self.norm))
        if self.norm:  # new gains change nothing yet, and must stay so
            for norm in norms_before(student, family).values():
                norm.requires_grad_(False)

    def arguments(self) -> dict[str, Any]:
        """Weight decay of the latent weights."""
        return {"weight_decay": self.weight_decay}

    def schedule(self, optimizer: Optimizer, steps: int) -> LRScheduler | None:
        """Two stages: half way the learning rate drops and weight decay ends."""
        return TwoStages(optimizer, steps) if self.two_stages else None

    def hand_on(self, student: PreTrainedModel, family: Family, dtype: torch.dtype) -> Layout:
        """Store codes and one scale a matrix."""
        linears = {n: m for n, m in student.named_modules() if isinstance(m, BitLinear)}
        stored = {name: linear.stored() for name, linear in linears.items()}
        bits: Literal[1, 2] = 2 if self.weights == "ternary" else 1
        eps = next(iter(linears.values())).norm_eps

        def encode(name: str, value: Tensor) -> Mapping[str, Tensor]:
            path = name.removesuffix(".weight")
            if path in stored:
                return bitnet_layout.encode_linear(path, stored[path], bits)
            return {name: value.to(dtype)}

        ternary = bits == 2
        return Layout(
            label=f"{'ternary, 2 bits stored' if ternary else 'binary, 1 bit'}, one scale a matrix, A8 per token",
            stored=stored,
            encode=encode,
            quantization=bitnet_layout.quantization_config(bits, eps, [family.head]),
            stem="model" if ternary else "frugallm",
            in_transformers=ternary,
            rounds_inputs=True,
            notes=(
                "transformers compiles parts of this layout on first use, which needs a C++ compiler "
                "(TORCHDYNAMO_DISABLE=1 does without)",
            )
            if ternary
            else (),
        )

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare ternary, binary and float training, and float made ternary: loss on held-out text."""
        training = bench.training
        arms: dict[str, tuple[list[TrainMethod], float]] = {
            "ternary": ([cls()], 1),
            "binary": ([cls(weights="binary")], 1),
            "float": ([], 1),
        }
        if training.thorough:  # the distance to float should shrink with the width
            arms.update({"ternary, half as wide": ([cls()], 0.5), "float, half as wide": ([], 0.5)})
        losses: dict[str, list[float]] = {name: [] for name in (*arms, "float made ternary")}
        for seed in training.seeds:
            for name, (steps, width) in arms.items():
                model = training.train(steps, seed, width)
                losses[name].append(training.loss(model))
                if name == "float":
                    losses["float made ternary"].append(training.loss(made_ternary(model)))
        order = [("ternary", "binary"), ("binary", "float made ternary"), ("ternary", "float made ternary")]
        return training.claim_order(losses, order)


class BitLinear(nn.Linear):
    """A linear whose weight is ternary or binary, and its input 8 bits, in every forward."""

    def __init__(self, linear: nn.Linear, kind: Kind, norm: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.kind = kind
        self.norm_eps = 1e-6 if norm else None
        self.rms_norm = nn.RMSNorm(self.in_features, eps=1e-6) if norm else None

    def stored(self) -> QuantizedTensor:
        """Return the codes as they will be stored."""
        return quantize(self.weight.detach(), self.kind)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(..., out)``, eq. (1) to (4)."""
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        input = straight_through(input, bitnet_layout.round_tokens(input.detach()))  # (1)
        weight = straight_through(self.weight, self.stored().dequantize())  # (2), (3)
        return F.linear(input, weight, self.bias)


def quantize(weight: Tensor, kind: Kind) -> QuantizedTensor:
    """Return the codes of a latent weight ``(out, in)``, eq. (2) or (3)."""
    weight = weight.float()
    scale = bitnet_layout.stored_scale(weight.abs().mean())  # ()
    if kind == "ternary":
        codes = (weight / scale).round_().clamp_(-1, 1)
    else:
        codes = torch.where(weight >= weight.mean(), 1.0, -1.0)
    rows = scale.expand(len(weight), 1).contiguous()
    return QuantizedTensor(codes.to(torch.int8), rows, None, bitnet_layout.SCHEME)


def made_ternary(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a trained model with the weights of its blocks ternary: what BitNet is not."""
    import copy

    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.weight.data = quantize(module.weight.data, "ternary").dequantize()
    return model


class TwoStages(LRScheduler):
    """A linear fall to zero after a warm-up; from half way on at two thirds of it, and without weight decay."""

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self.steps = steps
        self.decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of every group, and set its weight decay."""
        step = self.last_epoch
        second = 2 * step >= self.steps
        for group, decay in zip(self.optimizer.param_groups, self.decays):
            group["weight_decay"] = 0.0 if second else decay
        warm = min(1.0, (step + 1) / max(1.0, WARM_UP * self.steps))
        share = warm * max(0.0, 1 - step / self.steps) * (SECOND_STAGE if second else 1.0)
        return [base * share for base in self.base_lrs]
