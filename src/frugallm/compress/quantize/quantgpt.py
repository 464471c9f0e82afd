"""QuantGPT: two-bit weights trained by distillation, with contrasts between tokens and a range for each module.

Idea
----
Generative models made ternary learn word representations that are all alike, and their modules' weights differ so much
in size that one rule for the range fits none. So the student learns, besides the teacher's logits, to make each token's
last hidden state more like the teacher's state of the same token than like those of the other tokens of the sequence.
And each module has a factor of its own mean magnitude as its range, which all of its weights move.

Formula
-------
``w`` weights of a module (a row of the embedding), ``n`` how many, ``g`` trained, ``k = 2^(b-1) - 1``, ``h`` hidden
states of the last layer, ``P`` a trained projection, ``cos`` of two vectors, ``i`` and ``j`` tokens of one sequence::

    a = g |w|_1 / n,   w' = a Q(clamp(w, -a, a) / a),   Q(u) = round(k u) / k                   (1)
    dw'/da = Q(w/a) - w/a where |w| <= a, else sign(w);   dw'/dw = 1 where |w| <= a, else 0     (2)
    s_i = P h_i (student),  t_i = P h_i (teacher),  m_i <- momentum m_i + (1 - momentum) s_i    (3)
    C = -mean_i log( e^(cos(s_i, t_i)/T) / (e^(cos(s_i, t_i)/T) + sum_(j != i) e^(cos(s_i, m_j)/T)) )   (4)
    L = KL(teacher || student) + contrast C                                                     (5)

When to use it
--------------
At 2 bits, embedding included, where the training of the model is affordable and its text is at hand.

Cost
----
A training run with a second model in memory: 16 bytes per weight for the student, 4 for the teacher; and the memory of
representations, 4 bytes times tokens trained on times ``width``, which is in every checkpoint too.

Differences from the paper
--------------------------
No code by the authors was found. How ``s``, ``t`` and ``m`` mix in eq. (4) is our reading: the student's token against the
teacher's, all other tokens of the sequence as negatives, from the memory. One projection serves both. Values of
``contrast``, ``temperature``, ``momentum`` and the rates are ours. Inputs are rounded with one scale a token, where the
paper clips them by a trained range, so that engines can do the same. A head that is tied to the embedding is rounded
with it; one of its own stays. ``scaling=pact`` and ``lsq`` train the range itself instead of eq. (1) and begin at the
same range; the former leaves out the inside of eq. (2). Above 2 bits the range begins at the largest weight. The paper
fine-tunes GPT-2; here any model whose linears are plain ones (GPT-2's are not).

References
----------
Tao, Hou, Zhang, Shang, Jiang, Liu, Luo, Wong: Compression of Generative Pre-trained Language Models via Quantization,
ACL 2022, https://arxiv.org/abs/2203.10705; PACT, https://arxiv.org/abs/1805.06085; LSQ, https://arxiv.org/abs/1902.08153.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor
from frugallm.method import Card, Claim
from frugallm.training.contract import Batch, TrainMethod
from frugallm.training.distillation import logit_divergence, token_contrast
from frugallm.training.layouts import Layout, compressed
from frugallm.training.linears import block_linears
from frugallm.training.scaling import Scaling, clipped, clipped_codes
from frugallm.training.straight_through import round_inputs

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from frugallm.evaluate.bench import Bench
    from frugallm.models.family import Family


class QuantGPT(TrainMethod):
    """Distillation into two-bit weights with contrasts between tokens and trained ranges."""

    card: ClassVar[Card] = Card(
        title="QuantGPT",
        summary="2-bit weights by distillation, contrasts between tokens, and a trained range for each module",
        paper="Compression of Generative Pre-trained Language Models via Quantization",
        authors="Tao, Hou, Zhang, Shang, Jiang, Liu, Luo, Wong",
        year=2022,
        venue="ACL",
        arxiv="2203.10705",
        row="q-quantgpt",
        baseline="the same distillation with ranges trained as in PACT and LSQ, without contrasts",
        claim="At 2 bits, embedding included, module-wise dynamic scaling predicts better than ranges trained as in "
        "PACT and LSQ, and contrasts between tokens improve it further.",
        holds=False,
        reason="at 76 thousand weights dynamic scaling beats LSQ for every seed, but not PACT that begins at the same range "
        "(apart by less than seeds differ), and contrasts make tokens less alike for every seed without lowering the loss",
    )
    begins: ClassVar[Literal["model", "scratch", "either"]] = "model"
    needs_teacher: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 5e-4

    bits: Literal[2, 4, 8] = Field(2, description="bits per weight; 2: ternary")
    embedding: bool = Field(True, description="also round the embedding, and the head if it is tied to it")
    activation_bits: Literal[4, 8] | None = Field(
        8, description="bits of inputs, one scale a token; null: not rounded"
    )
    scaling: Literal["dynamic", "pact", "lsq"] = Field("dynamic", description="how ranges are trained")
    scale_rate: float = Field(5e-3, gt=0, le=1, description="learning rate of the ranges' factors")
    contrast: float = Field(0.1, ge=0, le=10, description="weight of the contrasts in the loss; 0: none")
    temperature: float = Field(0.1, gt=0, le=10, description="of the contrasts")
    momentum: float = Field(0.5, ge=0, lt=1, description="share of the old in the memory of representations")
    width: int = Field(64, ge=1, le=8192, description="of the projected representations")

    def rewrite(self, student: PreTrainedModel, family: Family) -> None:
        """Round all linears and the embedding on ranges that are trained, and add the projection."""
        inputs = None if self.activation_bits is None else ActivationScheme(bits=self.activation_bits)
        for name, linear in block_linears(student, family).items():
            student.set_submodule(name, ClippedLinear(linear, self.bits, self.scaling, inputs))
        if self.embedding:
            table = ClippedEmbedding(
                cast("nn.Embedding", student.get_input_embeddings()), self.bits, self.scaling
            )
            student.set_submodule(family.embedding, table)
            if student.config.tie_word_embeddings:
                student.set_submodule(family.head, TiedHead(table))
        if self.contrast:
            wide = nn.Linear(student.config.hidden_size, self.width, bias=False)
            student.register_module(PROJECTION, wide)

    def ready(self, student: PreTrainedModel, windows: Tensor) -> None:
        """Make room for the representations of all tokens."""
        if self.contrast:
            student.register_buffer(MEMORY, torch.zeros(*windows.shape, self.width))

    def optimizer(self, student: PreTrainedModel, learning_rate: float) -> Optimizer:
        """AdamW without weight decay; ranges have a rate of their own."""
        named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in named if not n.endswith(".clip")]},
            {"params": [p for n, p in named if n.endswith(".clip")], "lr": self._clip_rate(student)},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def _clip_rate(self, student: PreTrainedModel) -> float:
        """Return the rate of the ranges' parameters: factors are of the size of one, ranges of that of weights."""
        if self.scaling == "dynamic":
            return self.scale_rate
        ranges = [float(m.clip.detach().mean()) for m in student.modules() if isinstance(m, _Clip)]
        return self.scale_rate * sum(ranges) / len(ranges)

    def loss(self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Tensor:
        """Return eq. (5) of ``batch["input_ids"]`` ``(windows, length)``."""
        assert teacher is not None
        ids, deep = batch["input_ids"], bool(self.contrast)
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False, output_hidden_states=deep)
        given = student(input_ids=ids, use_cache=False, output_hidden_states=deep)
        loss = logit_divergence(given.logits, wanted.logits)
        if not deep:
            return loss
        project = student.get_submodule(PROJECTION)
        ours, theirs = project(given.hidden_states[-1]), project(wanted.hidden_states[-1])
        memory = student.get_buffer(MEMORY)
        with torch.no_grad():
            kept = memory[batch["index"]]  # (windows, length, width)
            new = kept.abs().sum(-1, keepdim=True) == 0
            kept = torch.where(new, ours, self.momentum * kept + (1 - self.momentum) * ours)  # (3)
            if student.training:
                memory[batch["index"]] = kept
        return loss + self.contrast * token_contrast(ours, theirs, kept, self.temperature)

    def hand_on(self, student: PreTrainedModel, family: Family, dtype: torch.dtype) -> Layout:
        """Store the codes; projection, memory and factors are not needed any more."""
        inputs = None if self.activation_bits is None else ActivationScheme(bits=self.activation_bits)
        linears = {n: m.stored() for n, m in student.named_modules() if isinstance(m, ClippedLinear)}
        tables = {n: m.stored() for n, m in student.named_modules() if isinstance(m, ClippedEmbedding)}
        tied = bool(student.config.tie_word_embeddings)
        dropped = (f"{PROJECTION}.weight", MEMORY, ".clip")
        return compressed(linears, tables, inputs, family, dtype, tied=tied, dropped=dropped)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare ways of training ranges, and contrasts: loss on held-out text."""
        training = bench.training
        arms = {
            "dynamic": cls(contrast=0),
            "pact": cls(scaling="pact", contrast=0),
            "lsq": cls(scaling="lsq", contrast=0),
            "dynamic with contrasts": cls(),
        }
        losses: dict[str, list[float]] = {name: [] for name in (*arms, "ternary, not trained")}
        alike: dict[str, list[float]] = {
            name: [] for name in ("teacher", "dynamic", "dynamic with contrasts")
        }
        for seed in training.seeds:
            teacher = training.train([], seed)
            models = {
                name: training.further([method], seed, cls.learning_rate) for name, method in arms.items()
            }
            models["ternary, not trained"] = training.further(
                [cls(contrast=0)], seed, cls.learning_rate, count=0
            )
            for name, model in models.items():
                losses[name].append(training.loss(model))
            for name in alike:
                model = teacher if name == "teacher" else models[name]
                alike[name].append(likeness(model, training.held_out[:8]))
        pairs = [
            ("dynamic with contrasts", "dynamic"),
            ("dynamic", "pact"),
            ("dynamic", "lsq"),
            ("dynamic", "ternary, not trained"),
        ]
        return training.claim_order(losses, pairs, likeness_of_tokens=alike)


PROJECTION, MEMORY = "contrast_projection", "contrast_memory"


class _Clip(nn.Module):
    """What linears and embeddings on trained ranges share: a weight, and what its range is made of."""

    weight: Tensor
    clip: Tensor

    def begin(self, weight: Tensor, bits: int, scaling: Scaling, by_row: bool) -> None:
        """Set the range: the mean magnitude for ternary grids, else the largest weight."""
        self.weight, self.bits, self.scaling, self.by_row = weight, bits, scaling, by_row
        size = weight.detach().abs()
        mean = self.size()
        widest = mean if bits == 2 else (size.amax(1) if by_row else size.amax().reshape(1))
        self.clip = nn.Parameter((widest / mean if scaling == "dynamic" else widest).clone())

    def size(self) -> Tensor:
        """Return the mean magnitude of the weight, ``(rows,)`` or ``(1,)``."""
        size = self.weight.detach().abs()
        return (size.mean(1) if self.by_row else size.mean().reshape(1)).clamp(min=1e-8)

    def range(self) -> Tensor:
        """Return ``a`` of eq. (1), ``(rows,)`` or ``(1,)``."""
        return self.clip * self.size() if self.scaling == "dynamic" else self.clip

    def rounded(self) -> Tensor:
        """Return the weight on its grid, with the gradients of eq. (2)."""
        return clipped(self.weight, self.range(), self.bits, self.scaling)

    def stored(self) -> QuantizedTensor:
        """Return the codes as they will be stored."""
        return clipped_codes(self.weight.detach(), self.range().detach(), self.bits)


class ClippedLinear(_Clip, nn.Linear):
    """A linear on a trained range, its inputs rounded."""

    def __init__(
        self, linear: nn.Linear, bits: int, scaling: Scaling, inputs: ActivationScheme | None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.inputs = linear.bias, inputs
        self.begin(linear.weight, bits, scaling, by_row=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(..., out)``."""
        x = input if self.inputs is None else round_inputs(input, self.inputs)
        return F.linear(x, self.rounded(), self.bias)


class ClippedEmbedding(_Clip, nn.Embedding):
    """An embedding on trained ranges, one a row."""

    def __init__(self, table: nn.Embedding, bits: int, scaling: Scaling) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx, self.scale = table.padding_idx, getattr(table, "embed_scale", None)
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.begin(table.weight, bits, scaling, by_row=True)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(..., width)``."""
        found = F.embedding(input, self.rounded(), self.padding_idx)
        return found if self.scale is None else found * self.scale


class TiedHead(nn.Linear):
    """A head that multiplies by the embedding as it is rounded."""

    def __init__(self, table: ClippedEmbedding) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = table.embedding_dim, table.num_embeddings
        self.weight = cast("nn.Parameter", table.weight)
        self.register_parameter("bias", None)
        self._table = [table]  # in a list, so that it is no module of the head as well

    def forward(self, input: Tensor) -> Tensor:
        """Return logits."""
        return F.linear(input, self._table[0].rounded())


@torch.inference_mode()
def likeness(model: PreTrainedModel, windows: Tensor) -> float:
    """Return the mean cosine of the last hidden states of different tokens of a window."""
    states = model(input_ids=windows, use_cache=False, output_hidden_states=True).hidden_states[-1]
    unit = F.normalize(states.float(), dim=-1)  # (windows, length, width)
    length = unit.shape[1]
    total = unit.sum(1).square().sum(-1) - length
    return float((total / (length * (length - 1))).mean())
