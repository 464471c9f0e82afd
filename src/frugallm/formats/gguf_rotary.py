"""Rotary position embeddings as GGUF says them: hyper-parameters, and divisors of the frequencies as tensors.

``transformers`` computes the frequencies of a kind of scaling from the configuration. llama.cpp has a formula for some kinds
(linear, yarn) and reads a divisor per frequency for others (llama3, longrope); which of them an architecture takes is in its
row of :mod:`~frugallm.formats.gguf_families`.

References
----------
Peng et al.: YaRN, ICLR 2024, https://arxiv.org/abs/2309.00071; Ding et al.: LongRoPE, ICML 2024,
https://arxiv.org/abs/2402.13753.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Constants of yarn that llama.cpp's files cannot change, with what it takes.
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


@dataclass(frozen=True)
class Rotary:
    """What a file says about rotary position embeddings.

    Attributes
    ----------
    metadata
        Keys, without the architecture in front, and values.
    divisors
        Names of tensors, ``(rotary width / 2,)`` float32: what each frequency is divided by.
    notes
        What to say before the work begins.
    differs
        What llama.cpp does not compute, in one clause; empty: nothing.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    divisors: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    differs: str = ""


def rotary(config: PretrainedConfig, width: int, kinds: tuple[str, ...], *, partial: bool) -> Rotary:
    """Describe the rotary position embeddings of a model.

    Parameters
    ----------
    width
        Of one head.
    kinds
        Kinds of scaling that the architecture takes, as ``transformers`` calls them; none: it has no rotary positions.
    partial
        Whether it can leave a part of each head as it is.
    """
    if not kinds:
        return Rotary()
    layers = config.rope_parameters
    chosen = layers.get("full_attention", layers)
    rotated = int(width * chosen.get("partial_rotary_factor", 1.0))
    kind = chosen["rope_type"]
    if kind not in kinds:
        return Rotary(differs=f"rotary frequencies are scaled by '{kind}'")
    if rotated != width and not partial:
        return Rotary(differs=f"rotary positions turn {rotated} of {width} entries of a head")
    metadata: dict[str, Any] = {
        "rope.dimension_count": rotated,
        "rope.freq_base": float(chosen["rope_theta"]),
    }
    local = layers.get("sliding_attention")
    if local is not None:
        if local["rope_type"] != "default":
            return Rotary(differs=f"frequencies of sliding windows are scaled by '{local['rope_type']}'")
        metadata["rope.freq_base_swa"] = float(local["rope_theta"])
    scaling = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}.get(kind)
    if scaling is None:
        return Rotary(metadata)
    scaled = scaling(config, chosen, rotated)
    return Rotary(metadata | scaled.metadata, scaled.divisors, scaled.notes, scaled.differs)


def _linear(config: PretrainedConfig, chosen: dict[str, Any], rotated: int) -> Rotary:
    return Rotary({"rope.scaling.type": "linear", "rope.scaling.factor": float(chosen["factor"])})


def _llama3(config: PretrainedConfig, chosen: dict[str, Any], rotated: int) -> Rotary:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = chosen["rope_theta"] ** -(torch.arange(0, rotated, 2).float() / rotated)
    return Rotary(divisors={"rope_freqs.weight": plain / scaled})


def _yarn(config: PretrainedConfig, chosen: dict[str, Any], rotated: int) -> Rotary:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name, value in YARN.items():
        asked = chosen.get(name)
        if asked is not None and asked != value:
            return Rotary(differs=f"{name} of the rotary scaling is {asked}, not {value}")
    metadata = _stretched("yarn", chosen) | {"rope.scaling.factor": float(chosen["factor"])}
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    taken = 0.1 * math.log(chosen["factor"]) + 1  # what llama.cpp multiplies cosines and sines with by itself
    if not math.isclose(factor, taken):
        metadata["rope.scaling.attn_factor"] = factor / taken
    return Rotary(metadata)


def _longrope(config: PretrainedConfig, chosen: dict[str, Any], rotated: int) -> Rotary:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    divisors = {
        f"rope_factors_{length}.weight": torch.tensor(chosen[f"{length}_factor"], dtype=torch.float32)
        for length in ("long", "short")
    }
    note = (
        f"llama.cpp takes the rotary factors of long texts where its context is set to more than "
        f"{chosen['original_max_position_embeddings']} tokens, transformers where the text is longer"
    )
    return Rotary(
        _stretched("longrope", chosen) | {"rope.scaling.attn_factor": float(factor)}, divisors, (note,)
    )


def _stretched(kind: str, chosen: dict[str, Any]) -> dict[str, Any]:
    length = int(chosen["original_max_position_embeddings"])
    return {"rope.scaling.type": kind, "rope.scaling.original_context_length": length}
