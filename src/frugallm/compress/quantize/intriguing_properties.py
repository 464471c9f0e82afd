"""Intriguing properties: train so that rounding afterwards costs little.

Idea
----
The few huge activations that make large models hard to quantize are no fate of their size: how a model was trained
decides whether they grow. Strong weight decay, gradient clipping, no dropout and bf16 rather than fp16 keep them small.
The step sets these four; the weights are stored as they are, and any post-training step rounds them later.

Formula
-------
``w`` a weight, ``g`` all gradients, ``h`` what a sublayer adds to the residual stream, ``r`` the learning rate::

    w <- w - r (Adam(g') + weight_decay w),    g' = g min(1, gradient_clipping / ||g||)         (1)
    x <- x + h m / (1 - dropout),              m ~ Bernoulli(1 - dropout) while training         (2)
    kurtosis = E (x - mean)^4 / Var(x)^2       of the inputs of linears, what is watched         (3)

When to use it
--------------
When a model is trained from scratch that is to be run with rounded weights and inputs. The defaults are the settings that
the paper found best for that.

Cost
----
None: the same training. The report's figures of quantizability take one forward of a few windows.

Differences from the paper
--------------------------
Models here have a million weights and see half a million tokens, against 410 million to 52 billion; outliers need longer
than that to grow. ``dtype`` runs the forward under autocast with float32 weights; float16 has no loss scaling, so small
gradients vanish, where the paper's trainings had it. What rounding costs is measured with naive static W8A8 (one scale a
row for weights, one a tensor for inputs) besides the paper's one scale a token, as loss on held-out text instead of
zero-shot tasks.

References
----------
Ahmadian, Dash, Chen, Venkitesh, Gou, Blunsom, Üstün, Hooker: Intriguing Properties of Quantization at Scale,
NeurIPS 2023, https://arxiv.org/abs/2305.19268.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.smoothquant import SmoothQuant
from frugallm.method import Card, Claim, Method
from frugallm.training.contract import TrainMethod
from frugallm.training.quantizability import input_spreads, summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from frugallm.evaluate.bench import Bench
    from frugallm.models.family import Family


class IntriguingProperties(TrainMethod):
    """Weight decay, clipping, dropout and type of a training, set so that rounding afterwards costs little."""

    card: ClassVar[Card] = Card(
        title="Intriguing Properties of Quantization at Scale",
        summary="weight decay, clipping, no dropout, bf16: a training whose model rounds well afterwards",
        paper="Intriguing Properties of Quantization at Scale",
        authors="Ahmadian, Dash, Chen, Venkitesh, Gou, Blunsom, Üstün, Hooker",
        year=2023,
        venue="NeurIPS",
        arxiv="2305.19268",
        row="q-intriguing",
        baseline="the same training with little weight decay, dropout and no clipping",
        claim="Trained with weight decay 0.1, clipping and no dropout a model loses less by naive static W8A8 than "
        "trained with weight decay 0.001, dropout 0.4 and no clipping.",
        holds=False,
        reason="static W8A8 costs either model about a thousandth of a nat, less than seeds differ: in models this small, "
        "trained this briefly, no outliers grow under any recipe",
    )
    learning_rate: ClassVar[float] = 3e-3

    weight_decay: float = Field(0.1, ge=0, le=1, description="of all matrices")
    gradient_clipping: float = Field(1.0, ge=0, description="largest norm of all gradients together; 0: none")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="of what attention and MLP add to the residual stream"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="type of the products while training"
    )

    def rewrite(self, student: PreTrainedModel, family: Family) -> None:
        """Drop out what sublayers add, eq. (2)."""
        if self.dropout:
            for index in range(student.config.num_hidden_layers):
                for sublayer in family.graph(student.config, index):
                    path = f"{family.block(index)}.{sublayer.modules[-1]}"
                    student.get_submodule(path).register_forward_hook(self._drop)

    def _drop(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._drop(module, inputs, output[0]), *output[1:])
        return F.dropout(output, self.dropout, module.training)

    def arguments(self) -> dict[str, Any]:
        """Weight decay and clipping, eq. (1)."""
        return {"weight_decay": self.weight_decay, "max_grad_norm": self.gradient_clipping}

    def context(self) -> AbstractContextManager[Any]:
        """Products in half precision."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast("cpu", getattr(torch, self.dtype))

    def remarks(self, student: PreTrainedModel, family: Family, windows: Tensor) -> list[str]:
        """Say how uneven the inputs of linears are, eq. (3)."""
        found = summary(input_spreads(student, family, windows[:8]))
        return ["inputs of linears: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items())]

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare what static W8A8 costs after the two trainings: loss on held-out text, each against its own."""
        from frugallm.models.family import family_of

        training = bench.training
        hostile = {"weight_decay": 0.001, "dropout": 0.4, "gradient_clipping": 0.0}
        arms = {"friendly": {}, "hostile": hostile}
        if training.thorough:  # one change at a time
            arms.update({f"{key} {value:g}": {key: value} for key, value in hostile.items()})
        naive: dict[str, list[Method]] = {
            "static": [SmoothQuant(sites=())],
            "per token": [SmoothQuant(sites=(), activation="token")],
            "W4A8 static": [SmoothQuant(sites=()), RTN(bits=4, group_size=-1)],
        }
        costs: dict[str, list[float]] = {name: [] for name in arms}
        facts: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for seed in training.seeds:
            for name, changes in arms.items():
                model = training.train([cls(dtype="float32", **changes)], seed)
                loss = training.loss(model)
                cost = {k: training.loss(training.compressed(model, s)) - loss for k, s in naive.items()}
                costs[name].append(cost.pop("static"))
                spreads = input_spreads(model, family_of(model.config), training.held_out[:16])
                others = {f"cost {k}": value for k, value in cost.items()}
                facts[name].append({"loss": loss, **others, **summary(spreads)})
        metric = "loss by static W8A8, nats/token"
        return training.claim_order(costs, [("friendly", "hostile")], metric, facts=facts)
