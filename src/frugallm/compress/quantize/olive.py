"""OliVe: an outlier is stored in the place of its neighbor, which becomes zero. Everything takes 4 bits.

Idea
----
A few weights are much larger than the rest. Covering them makes the step coarse for all, cutting them off hurts most.
Their neighbors, taken by chance, hardly matter. So weights are taken in pairs; where one of a pair is an outlier the
other, the victim, is set to zero, and its code says that the first is to be read as a number of the outliers' own
format. No index says where outliers are, and rows keep their length.

Formula
-------
``w`` a row (or group) with mean ``m`` and standard deviation ``d``; pairs ``(w_2i, w_2i+1)``::

    a = p max|m +- 3 d|,   s = a / 7                                                    (1)
    both normal:  codes round(w / s) in [-7, 7]                                         (2)
    an outlier:   its nearest of +-{12, 16, 24, 32, 48, 64, 96} s, the victim is 0      (3)
    p in [0.75, 2.5] with the least squared error, victims included                     (4)

A weight is an outlier where ``|w / s|`` is nearer to 12 than to 7; of two in a pair the larger stays. The victim's code
is -8, which (2) does not use.

When to use it
--------------
At 4 bits with one scale a row, where a decoder of such pairs is at hand: the paper is about one in hardware. Smaller
groups of plain integers do as well for a quarter of a bit more, and every engine reads them.

Cost
----
``steps`` roundings of every weight; no calibration text unless inputs are rounded.

Differences from the paper
--------------------------
Normal values are integers; the paper also tries its ``flint4`` for every tensor. Of two outliers the authors' code keeps
the first, not the larger. Their search takes 88 values of ``p``. By default only weights are rounded, where the paper
rounds inputs in the same way: 4 bits a tensor cost a small model most of what it knows. ``activation="static"`` does it,
with ``s`` of (1) for the whole tensor searched on a sample of the calibration inputs. ``pairs=false`` is the comparison:
the same search, and outliers are cut off. No engine reads such codes; FrugalLM stores them as they are, in 4 bits, and
computes with the values that they stand for.

References
----------
Guo, Tang, Hu, Leng, Zhang, Yang, Liu, Guo, Zhu: OliVe: Accelerating Large Language Models via Hardware-friendly
Outlier-Victim Pair Quantization, ISCA 2023, https://arxiv.org/abs/2304.07493;
code https://github.com/clevercool/ANT-Quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from frugallm.compress.contract import BlockMethod, resolve_group_size
from frugallm.compress.quantize.grids import best_of, encode, grouped, stored
from frugallm.errors import ParameterError
from frugallm.formats.levels import LARGEST
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.formats.rounded_inputs import round_activations
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from frugallm.evaluate.bench import Bench

_LAST = LARGEST["olive"]
_ENTRIES_AT_ONCE = 2**18


class Olive(BlockMethod):
    """Outlier-victim pairs in 4 bits."""

    card: ClassVar[Card] = Card(
        title="OliVe",
        summary="4 bits in pairs: an outlier takes the place of its neighbor, which becomes zero",
        paper="OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair Quantization",
        authors="Guo, Tang, Hu, Leng, Zhang, Yang, Liu, Guo, Zhu",
        year=2023,
        venue="ISCA",
        arxiv="2304.07493",
        code="https://github.com/clevercool/ANT-Quantization",
        row="q-olive",
        baseline="the same search with outliers cut off (pairs=false)",
        claim="At 4 bits with one scale a row the model stays closer to the original than with outliers cut off.",
        holds=False,
        reason="the weights of the tiny model have no tails, and one of 16 codes marks victims; with inputs in 4 bits too, "
        "which do have outliers, it holds by far (details)",
        expect_fail={
            "the_folder_loads_without_us_to_equal_logits": "no engine knows pairs with outliers; plain transformers "
            "refuses the folder"
        },
    )
    solves: ClassVar[Literal["step", "default", "no"]] = "step"

    group_size: int | None = Field(
        -1,
        ge=-1,
        description="input columns that share one scale; -1: the whole row; null: 128 or what fits",
    )
    pairs: bool = Field(
        True, description="store outliers in the place of their neighbors; false: cut them off"
    )
    activation: Literal["none", "static"] = Field(
        "none", description="round inputs to 4 bits in the same way, with one scale a tensor, or not at all"
    )
    steps: int = Field(24, ge=1, le=200, description="how many ranges are tried")

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return pairs, or integers from -8 to 7, in 4 bits."""
        for name, width in widths.items():
            if width % 2:
                raise ParameterError(
                    f"{self.name()}: the {width} inputs of {name} make no pairs", "Skip that linear"
                )
        group = resolve_group_size(self.name(), self.group_size, widths)
        return WeightScheme(bits=4, grid=self._grid, group_size=group)

    @property
    def _grid(self) -> Literal["olive", "int"]:
        return "olive" if self.pairs else "int"

    @property
    def _factors(self) -> list[float]:
        return torch.linspace(0.75, 2.5, self.steps).tolist() if self.steps > 1 else [1.0]

    def activations(self, name: str) -> ActivationScheme | None:
        """Return 4 bits, static, on the grid of the weights, if inputs are rounded."""
        return None if self.activation == "none" else ActivationScheme(bits=4, grid=self._grid, dynamic=False)

    def input_needs(self, scheme: ActivationScheme) -> frozenset[str]:
        """Return the names of the statistics that :meth:`input_parameters` reads."""
        return frozenset({"absmax", "sample"})

    def input_parameters(
        self, scheme: ActivationScheme, statistics: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the scale of least squared error on a sample of inputs, eq. (1) and (4)."""
        x = statistics["sample"]  # (tokens, in)
        widest = _three_deviations(x.flatten()) / _LAST
        scales = [(widest * p).clamp(min=1e-8).reshape(1) for p in self._factors]
        errors = [(round_activations(x, scheme, {"input_scale": s}) - x).square().sum() for s in scales]
        return {"input_scale": scales[int(torch.stack(errors).argmin())]}

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Round ``weight`` ``(out, in)``, eq. (1) to (4)."""
        rows = max(1, _ENTRIES_AT_ONCE // weight.shape[1])
        scale = torch.cat([self._scale(piece, scheme) for piece in weight.split(rows)])
        return QuantizedTensor(encode(weight, scale, None, scheme), scale, None, scheme)

    def _scale(self, weight: Tensor, scheme: WeightScheme) -> Tensor:
        widest = _three_deviations(grouped(weight, scheme)) / _LAST  # (out, groups)
        candidates = ((stored(widest * p, scheme), None) for p in self._factors)
        return best_of(weight, scheme, candidates)[0]

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with outliers cut off, same search and bytes: KL to the original, held-out text."""
        claim = bench.claim_lower(
            ours=[cls()], baseline=[cls(pairs=False)], baseline_name="int4, one scale a row, same search"
        )
        inputs = {p: bench.kl(cls(pairs=p, activation="static")) for p in (True, False)}
        more = {
            "kl with inputs in 4 bits too": {"pairs": inputs[True], "cut off": inputs[False]},
            "kl with nothing rounded": _victims_against_clipping(bench),
        }
        return claim.model_copy(update={"details": {**claim.details, **more}})


def _three_deviations(values: Tensor) -> Tensor:
    """Return ``max|m +- 3 d|`` over the last dimension."""
    return values.mean(-1).abs() + 3 * values.std(-1, correction=0)


def _victims_against_clipping(bench: Bench) -> dict[str, float]:
    """Return the KL of two models that are not rounded: victims of outliers made zero, or the outliers cut off.

    This is the paper's motivation. Outliers are weights beyond three deviations of their row.
    """
    changes = {"victims zero": _without_victims, "outliers cut off": _clipped}
    return {what: bench.kl_of(what, _changed(bench, change)) for what, change in changes.items()}


def _without_victims(weight: Tensor) -> Tensor:
    outlier = weight.abs() > _three_deviations(weight)[:, None]
    beside = outlier.view(len(weight), -1, 2).flip(-1).view_as(weight)
    return weight.masked_fill(beside & ~outlier, 0.0)


def _clipped(weight: Tensor) -> Tensor:
    limit = _three_deviations(weight)[:, None]
    return weight.clamp(-limit, limit)


def _changed(bench: Bench, change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """Return the bench's model with every linear of its blocks changed."""
    from frugallm.models.open import dense_model

    model = dense_model(bench.checkpoint, torch.float32)
    for path in bench.checkpoint.linears():
        weight = model.get_parameter(f"{path}.weight")
        weight.data = change(weight.data)
    return model
