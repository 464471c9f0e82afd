"""LLM-QAT: train on the model's own text with weights, inputs and KV cache rounded, against its own logits.

Idea
----
Training with rounded weights makes up for what rounding costs, but the data that a model was trained on is rarely at hand,
and other data pulls it elsewhere. So the model writes the text itself: a first token from the vocabulary, a few likeliest
tokens, then samples. The student, whose weights, inputs, keys and values are rounded in every forward, learns the whole
distribution that the unrounded model gives at every position; no label of the text is used.

Formula
-------
``w`` a row of a weight, ``x`` a token's input, ``k`` and ``v`` its keys and values, ``Q_b`` rounding to ``b`` bits::

    Q_b(u) = s clamp(round(u / s), -2^(b-1), 2^(b-1) - 1),   s = max|u| / ((2^b - 1) / 2)       (1)
    y = Q_a(x) Q_b(W)^T,   k' = Q_kv(k),   v' = Q_kv(v)       before positions are turned in     (2)
    L = mean over tokens of KL(softmax(teacher) || softmax(student))                             (3)

Gradients pass ``Q`` straight through. Ranges are never clipped: a few large values matter.

When to use it
--------------
At 3 or 4 bits with rounded inputs or KV cache, where ``gptq`` and ``smoothquant`` lose too much, and a training run of
the model is affordable.

Cost
----
Generation of ``generated`` windows, one forward each token; then a training run with a second model in memory: 16 bytes
per weight for the student, 4 for the teacher.

Differences from the paper
--------------------------
The scale covers the range with ``(2^b - 1) / 2`` codes, not ``2^(b-1) - 1``, so that engines' own grids hold the result.
Gradients are never set to zero, where the authors' code does it from a magnitude of 2 on. 256 windows are generated, the
paper has 100,000. Weights train at the same rate throughout (cosine, 2e-5 as in the paper; small models want more). The
KV cache is rounded while training and in the figure that the report gives for it; no format says so, so in the folder
it is not rounded. Below 3 bits the paper's code takes other grids; here bits begin at 2 on the same one.

References
----------
Liu, Oguz, Zhao, Chang, Stock, Mehdad, Shi, Krishnamoorthi, Chandra: LLM-QAT: Data-Free Quantization Aware Training for
Large Language Models, Findings of ACL 2024, https://arxiv.org/abs/2305.17888;
code https://github.com/facebookresearch/LLM-QAT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.errors import ModelError
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.method import Card, Claim
from frugallm.training.contract import Batch, TrainMethod
from frugallm.training.distillation import logit_divergence
from frugallm.training.generations import generated
from frugallm.training.layouts import Layout, compressed
from frugallm.training.linears import block_linears
from frugallm.training.straight_through import round_inputs, straight_through

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from frugallm.evaluate.bench import Bench
    from frugallm.models.family import Family


class LLMQAT(TrainMethod):
    """Data-free training with rounded weights, inputs and KV cache."""

    card: ClassVar[Card] = Card(
        title="LLM-QAT",
        summary="trained on its own generations with weights, inputs and KV cache rounded, against its own logits",
        paper="LLM-QAT: Data-Free Quantization Aware Training for Large Language Models",
        authors="Liu, Oguz, Zhao, Chang, Stock, Mehdad, Shi, Krishnamoorthi, Chandra",
        year=2024,
        venue="Findings of ACL",
        arxiv="2305.17888",
        code="https://github.com/facebookresearch/LLM-QAT",
        row="q-llm-qat",
        baseline="rtn and gptq with inputs and KV cache rounded alike; training on random tokens",
        claim="With 3-bit weights, 8-bit inputs and a 4-bit KV cache, training on its own generations brings a model "
        "closer to the original than rounding, GPTQ, and the same training on random tokens.",
    )
    begins: ClassVar[Literal["model", "scratch", "either"]] = "model"
    needs_teacher: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 2e-5

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits per weight, one scale a row")
    activation_bits: Literal[4, 5, 6, 7, 8] | None = Field(
        8, description="bits of inputs, one scale a token; null: not rounded"
    )
    kv_bits: Literal[4, 5, 6, 7, 8] | None = Field(
        4, description="bits of keys and values, one scale a token; null: not rounded"
    )
    generated: int = Field(256, ge=0, description="windows the model writes itself; 0: train on the text")
    greedy: int = Field(4, ge=0, description="likeliest tokens at the beginning of each window")

    def rewrite(self, student: PreTrainedModel, family: Family) -> None:
        """Round weights and inputs of all linears, and what keys and values are made of."""
        weights = WeightScheme(bits=self.bits)
        inputs = self._inputs()
        if inputs is not None and self.bits == 8:  # integer kernels multiply by these in float32
            weights = WeightScheme(bits=8, scale_dtype="float32")
        linears = block_linears(student, family)
        if self.kv_bits is not None and not any(name.endswith(KEYS_AND_VALUES) for name in linears):
            raise ModelError(
                f"llm_qat: {student.config.model_type} makes keys and values in one linear with others",
                "Use kv_bits=null",
            )
        for name, linear in linears.items():
            cached = self.kv_bits if name.endswith(KEYS_AND_VALUES) else None
            student.set_submodule(name, RoundedLinear(linear, weights, inputs, cached))

    def _inputs(self) -> ActivationScheme | None:
        return None if self.activation_bits is None else ActivationScheme(bits=self.activation_bits)

    def data(self, teacher: PreTrainedModel, windows: Tensor, seed: int) -> Tensor:
        """Let the teacher write what is trained on, in windows as long as those of the text."""
        if not self.generated:
            return windows
        return generated(teacher, self.generated, windows.shape[1], self.greedy, seed)

    def loss(self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Tensor:
        """Return eq. (3) of ``batch["input_ids"]`` ``(windows, length)``."""
        assert teacher is not None
        with torch.no_grad():
            wanted = teacher(input_ids=batch["input_ids"], use_cache=False).logits
        return logit_divergence(student(input_ids=batch["input_ids"], use_cache=False).logits, wanted)

    def remarks(self, student: PreTrainedModel, family: Family, windows: Tensor) -> list[str]:
        """Say what rounding the KV cache costs, which the folder cannot say."""
        if self.kv_bits is None:
            return []
        losses = []
        for bits in (None, self.kv_bits):
            round_cache(student, bits)
            with torch.inference_mode():
                each = [
                    float(student(input_ids=w[None], labels=w[None], use_cache=False).loss) for w in windows
                ]
            losses.append(sum(each) / len(each))
        round_cache(student, None)
        return [
            f"the KV cache was rounded to {self.kv_bits} bits while training; no format says so, and loaded it is not: "
            f"held-out loss {losses[0]:.4f}, with the cache rounded {losses[1]:.4f} nats/token"
        ]

    def hand_on(self, student: PreTrainedModel, family: Family, dtype: torch.dtype) -> Layout:
        """Store the codes; from here on the cache is not rounded any more, as in the folder."""
        round_cache(student, None)
        linears = {n: m.stored() for n, m in student.named_modules() if isinstance(m, RoundedLinear)}
        tied = bool(student.config.tie_word_embeddings)
        return compressed(linears, {}, self._inputs(), family, dtype, tied=tied)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with rounding, GPTQ and random tokens on the same grids: KL to the original on held-out text."""
        training = bench.training
        ours = cls(bits=3, kv_bits=4)
        arms = ("llm_qat", "rtn", "gptq", "llm_qat on random tokens")
        found: dict[str, list[float]] = {name: [] for name in arms}
        for seed in training.seeds:
            teacher = training.train([], seed)
            size = (ours.generated, training.windows.shape[1])
            noise = torch.randint(
                teacher.config.vocab_size, size, generator=torch.Generator().manual_seed(seed)
            )
            random = training.further([cls(bits=3, kv_bits=4, generated=0)], seed, RATE, noise)
            models = {
                "llm_qat": training.further([ours], seed, RATE),
                "rtn": _rounded(teacher, ours),
                "gptq": _rounded(
                    training.compressed(teacher, [GPTQ(bits=3, group_size=-1)]), ours, weights=False
                ),
                "llm_qat on random tokens": random,
            }
            for name, model in models.items():
                round_cache(model, ours.kv_bits)
                found[name].append(training.divergence(model, teacher))
        pairs = [("llm_qat", name) for name in arms[1:]]
        return training.claim_order(found, pairs, "kl, nats/token")


#: Learning rate of the claim's small models.
RATE = 1e-3
#: Linears whose outputs go into the KV cache.
KEYS_AND_VALUES = (".k_proj", ".v_proj")


class RoundedLinear(nn.Linear):
    """A linear with weight, input and, where it makes keys or values, output rounded in every forward.

    Attributes
    ----------
    weights
        The grid of the weight; ``None``: it is as it is.
    inputs, cached_bits
        How inputs are rounded; bits of outputs. ``None``: they are as they are.
    """

    def __init__(
        self,
        linear: nn.Linear,
        weights: WeightScheme | None,
        inputs: ActivationScheme | None,
        cached_bits: int | None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weights, self.inputs, self.cached_bits = weights, inputs, cached_bits
        self.caches = cached_bits is not None

    def stored(self) -> QuantizedTensor:
        """Return the codes as they will be stored, eq. (1)."""
        assert self.weights is not None
        return round_to_nearest(self.weight.detach(), self.weights)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(..., out)``, eq. (2)."""
        weight = self.weight
        if self.weights is not None:
            weight = straight_through(weight, self.stored().dequantize())
        if self.inputs is not None:
            input = round_inputs(input, self.inputs)
        output = F.linear(input, weight, self.bias)
        if self.cached_bits is not None:
            output = round_inputs(output, ActivationScheme(bits=self.cached_bits))
        return output


def round_cache(student: PreTrainedModel, bits: int | None) -> None:
    """Round keys and values to ``bits`` from now on, or not at all, in a student that was trained with them rounded."""
    for module in student.modules():
        if isinstance(module, RoundedLinear) and module.caches:
            module.cached_bits = bits


def _rounded(model: PreTrainedModel, method: LLMQAT, *, weights: bool = True) -> PreTrainedModel:
    """Return a copy with inputs and KV cache rounded as in training, and with ``weights`` also those."""
    import copy

    from frugallm.models.family import family_of

    model = copy.deepcopy(model)
    method.rewrite(model, family_of(model.config))
    if not weights:
        for module in model.modules():
            if isinstance(module, RoundedLinear):
                module.weights = None
    return model
