"""The site graph: one description per model family of what a decoder block is made of.

A decoder block is a sequence of *sublayers* (attention, feed-forward). Each normalises the residual stream, computes
something from it, and adds the result back through one *output* linear. The places where linears read are *sites*:
linears at one site share their input, so they share its statistics, and whatever writes that input can absorb a scale.
Transforms, solvers, the walk and the exporters all read this one description.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig

from frugallm.errors import ModelError


@dataclass(frozen=True)
class Site:
    """A place in a block where one or more linears read the same input.

    Attributes
    ----------
    linears
        Paths of the linears inside the block; weights are ``(out, in)``.
    writer
        Path of what writes the input: a norm (its gain absorbs any scale) or a linear (its rows do).
    writer_kind
        ``"norm"``; ``"heads"``: a value projection, whose rows feed the columns of a whole query group, so a scale
        must be equal over the group; ``"rows"``: a linear whose row *j* feeds column *j* alone.
    """

    linears: tuple[str, ...]
    writer: str
    writer_kind: Literal["norm", "heads", "rows"]

    @property
    def name(self) -> str:
        """Name the site by the first linear that reads it."""
        return self.linears[0]


@dataclass(frozen=True)
class Sublayer:
    """``x + output(module(norm(x)))``: ``module`` is run with its output linear taken out to see that linear's input."""

    norm: str
    module: str
    reads: Site
    output: Site
    attention: bool


@dataclass(frozen=True)
class Family:
    """Where the parts of a model of one family are, as paths from the top of its state dict."""

    model_types: tuple[str, ...]
    embedding: str
    head: str
    blocks: str
    final_norm: str
    rotary: str
    sublayers: tuple[Sublayer, ...]

    def block(self, index: int) -> str:
        """Return the path of block ``index``, without a trailing dot."""
        return f"{self.blocks}.{index}"

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites of a block in the order in which they are computed."""
        return tuple(site for sub in self.sublayers for site in (sub.reads, sub.output))

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a block in the order in which they are computed."""
        return tuple(linear for site in self.sites for linear in site.linears)


LLAMA = Family(
    model_types=("llama",),
    embedding="model.embed_tokens",
    head="lm_head",
    blocks="model.layers",
    final_norm="model.norm",
    rotary="model.rotary_emb",
    sublayers=(
        Sublayer(
            norm="input_layernorm",
            module="self_attn",
            reads=Site(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "norm"
            ),
            output=Site(("self_attn.o_proj",), "self_attn.v_proj", "heads"),
            attention=True,
        ),
        Sublayer(
            norm="post_attention_layernorm",
            module="mlp",
            reads=Site(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "norm"),
            output=Site(("mlp.down_proj",), "mlp.up_proj", "rows"),
            attention=False,
        ),
    ),
)

FAMILIES = (LLAMA,)


def family_of(config: PretrainedConfig) -> Family:
    """Return the description of the model family that ``config`` names.

    Raises
    ------
    ModelError
        If the architecture has no description.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise ModelError(f"architecture '{config.model_type}' is not supported", f"Supported: {known}")
