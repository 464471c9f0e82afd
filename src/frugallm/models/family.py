"""The site graph: one description per model family of what a decoder block is made of.

A decoder block is a sequence of *sublayers* (attention, feed-forward). Each normalises the residual stream, computes
something from it, and adds the result back. The places where linears read are *sites*: linears at one site share their
input, so they share its statistics, and whatever writes that input can absorb a scale. Transforms, solvers, the walk
and the exporters all read this one description.

Names are those of the ``transformers`` model with every linear-like parameter as a linear of its own: GPT-2's ``Conv1D``
weights turned to ``(out, in)``, fused experts taken apart (:mod:`frugallm.models.linears`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from frugallm.errors import ModelError

Rows = Literal["all", "values", "values by head", "second half"]


@dataclass(frozen=True)
class Site:
    """A place in a block where one or more linears read the same input.

    Attributes
    ----------
    linears
        Paths of the linears inside the block; weights are ``(out, in)``.
    writer
        Path of what can absorb a scale on the input: a norm (its gain) or a linear (its rows); ``None`` where nothing
        can, because the activation function in between lets no scale pass.
    writer_kind
        ``"norm"``; ``"heads"``: value projections, whose rows feed the columns of a whole query group, so a scale
        must be equal over the group; ``"rows"``: a linear whose row *j* feeds column *j* alone.
    writer_rows
        Which rows of the writing linear: all; the values of a fused ``[q | k | v]``; the values of a fused weight that
        is interleaved by head, ``[q k v | q k v | …]``; the second half of a fused ``[gate | up]``.
    others
        Paths of further readers that are never compressed (a router) but must follow a fold.
    input_of
        Path of the module whose first input is the site's; ``None``: the first linear.
    through
        Activation function (its name in the configuration) that lies between writer and input. Only ReLU lets a positive
        scale pass.
    """

    linears: tuple[str, ...]
    writer: str | None
    writer_kind: Literal["norm", "heads", "rows"] | None
    writer_rows: Rows = "all"
    others: tuple[str, ...] = ()
    input_of: str | None = None
    through: str | None = None

    @property
    def name(self) -> str:
        """Name the site by the first linear that reads it."""
        return self.linears[0]


@dataclass(frozen=True)
class Sublayer:
    """What a block adds to the residual stream: ``x + output(...reads(norm(x)))``, whatever stands around it.

    Attributes
    ----------
    modules
        Paths of the modules that compute it; the last one's result is what the block adds. To take the sublayer out, the
        last is made to return zeros and those before it to do nothing.
    reads, outputs
        The site that reads the normalised stream, and those whose linears write back: one, or one per expert.
    attention
        Whether the module returns a pair.
    routed
        Whether the outputs are those of experts, each with the tokens sent to it.
    """

    modules: tuple[str, ...]
    reads: Site
    outputs: tuple[Site, ...]
    attention: bool = False
    routed: bool = False

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites in the order in which they are computed."""
        return (self.reads, *self.outputs)


@dataclass(frozen=True)
class Experts:
    """Where the experts of a mixture lie in a block, and how many there are.

    Attributes
    ----------
    path, router
        Paths of the module with the fused experts and of the router.
    count
        Name of the configuration's field.
    norm
        Path of the norm whose output they read.
    """

    path: str
    router: str
    count: str
    norm: str

    def sublayer(self, config: PretrainedConfig) -> Sublayer:
        """Return the sublayer of all experts. Every one of them is calibrated with the tokens that come to the block.

        What an expert's last linear reads is that expert's alone, and only of the tokens sent to it.
        """
        each = [f"{self.path}.{e}" for e in range(getattr(config, self.count))]
        reads = Site(
            tuple(f"{e}.{leaf}" for e in each for leaf in ("gate_proj", "up_proj")),
            self.norm,
            "norm",
            others=(self.router,),
            input_of=self.path,
        )
        outputs = tuple(Site((f"{e}.down_proj",), f"{e}.up_proj", "rows") for e in each)
        return Sublayer((self.path.rpartition(".")[0],), reads, outputs, routed=True)


@dataclass(frozen=True)
class Family:
    """Where the parts of a model of one family are, as paths from the top of its state dict.

    Attributes
    ----------
    model_types
        Names in the configuration.
    base
        Path of the model without its head; files may leave it out of their names.
    sublayers
        What a block is made of.
    experts
        The mixture that stands in the place of the last sublayer in some or all blocks.
    transposed
        Whether the linears of the blocks are ``Conv1D``, stored ``(in, out)``.
    gain_offset
        What a norm adds to its stored gain (Gemma: 1).
    renames
        Names in files against names here: ``(in the file, here)``, parts of names.
    """

    model_types: tuple[str, ...]
    base: str
    embedding: str
    head: str
    blocks: str
    final_norm: str
    sublayers: tuple[Sublayer, ...]
    experts: Experts | None = None
    transposed: bool = False
    gain_offset: float = 0.0
    renames: tuple[tuple[str, str], ...] = ()

    def block(self, index: int) -> str:
        """Return the path of block ``index``, without a trailing dot."""
        return f"{self.blocks}.{index}"

    def graph(self, config: PretrainedConfig, index: int) -> tuple[Sublayer, ...]:
        """Return the sublayers of block ``index`` in the order in which they are computed."""
        sublayers = tuple(_legal(sublayer, config) for sublayer in self.sublayers)
        if self.experts is not None and has_experts(config, index):
            return (*sublayers[:-1], self.experts.sublayer(config))
        return sublayers

    def sites(self, config: PretrainedConfig, index: int) -> tuple[Site, ...]:
        """Return all sites of block ``index`` in the order in which they are computed."""
        return tuple(site for sublayer in self.graph(config, index) for site in sublayer.sites)

    def linears(self, config: PretrainedConfig, index: int) -> tuple[str, ...]:
        """Return the paths of all linears of block ``index`` in the order in which they are computed."""
        return tuple(linear for site in self.sites(config, index) for linear in site.linears)


def _legal(sublayer: Sublayer, config: PretrainedConfig) -> Sublayer:
    """Drop the writers that the configured activation function, or clipped values (OLMoE), cut off."""
    clipped = getattr(config, "clip_qkv", None) is not None

    def site(s: Site) -> Site:
        cut = s.through is not None and getattr(config, s.through) != "relu"
        cut = cut or (clipped and s.writer_kind == "heads")
        return replace(s, writer=None, writer_kind=None) if cut else s

    return replace(sublayer, reads=site(sublayer.reads), outputs=tuple(map(site, sublayer.outputs)))


def has_experts(config: PretrainedConfig, index: int) -> bool:
    """Whether block ``index`` of a model with experts has them (Qwen3-MoE may keep some blocks dense)."""
    every = getattr(config, "decoder_sparse_step", 1)
    return index not in (getattr(config, "mlp_only_layers", None) or ()) and (index + 1) % every == 0


def parallel(config: PretrainedConfig) -> bool:
    """Whether all sublayers of a block read the block's input, not what the one before has added to it."""
    return bool(getattr(config, "use_parallel_residual", False))


@dataclass(frozen=True)
class Heads:
    """Shape of the attention: query heads, key/value heads, width of one head."""

    query: int
    values: int
    width: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Heads:
        """Read the shape from a configuration of any family."""
        query = config.num_attention_heads
        values = getattr(config, "num_key_value_heads", None) or query
        return cls(query, values, getattr(config, "head_dim", None) or config.hidden_size // query)

    @property
    def repeats(self) -> int:
        """Query heads that share one value head."""
        return self.query // self.values


def writing_rows(site: Site, rows: int, heads: Heads) -> Tensor:
    """Return which of the ``rows`` rows of a site's writer feed its input, in the order of the input's channels.

    For ``"heads"`` these are the value rows, ``values * width`` of them.
    """
    every = torch.arange(rows)
    if site.writer_rows == "values":
        return every[rows - heads.values * heads.width :]
    if site.writer_rows == "values by head":
        return every.view(heads.query, 3, heads.width)[:, 2].reshape(-1)
    return every[rows // 2 :] if site.writer_rows == "second half" else every


def _attention(module: str, norm: str, reads: tuple[str, ...], output: str, rows: Rows = "all") -> Sublayer:
    """Return an attention sublayer: the last of what ``reads`` holds the values, in these ``rows``."""
    linears = tuple(f"{module}.{linear}" for linear in reads)
    return Sublayer(
        modules=(module,),
        reads=Site(linears, norm, "norm"),
        outputs=(Site((f"{module}.{output}",), linears[-1], "heads", rows),),
        attention=True,
    )


def _plain(modules: tuple[str, ...], norm: str, first: str, last: str, through: str) -> Sublayer:
    """Return a feed-forward sublayer of two linears around an activation function."""
    return Sublayer(
        modules=modules,
        reads=Site((first,), norm, "norm"),
        outputs=(Site((last,), first, "rows", through=through),),
    )


def _gated(norm: str, *linears: str, rows: Rows = "all") -> Sublayer:
    """Return a gated feed-forward sublayer: the ``up`` half feeds ``down_proj`` without an activation function."""
    return Sublayer(
        modules=("mlp",),
        reads=Site(tuple(f"mlp.{x}" for x in linears), norm, "norm"),
        outputs=(Site(("mlp.down_proj",), f"mlp.{linears[-1]}", "rows", rows),),
    )


QKV = ("q_proj", "k_proj", "v_proj")
LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    base="model",
    embedding="model.embed_tokens",
    head="lm_head",
    blocks="model.layers",
    final_norm="model.norm",
    sublayers=(
        _attention("self_attn", "input_layernorm", QKV, "o_proj"),
        _gated("post_attention_layernorm", "gate_proj", "up_proj"),
    ),
)
GEMMA3 = replace(
    LLAMA,
    model_types=("gemma3_text",),
    sublayers=(LLAMA.sublayers[0], _gated("pre_feedforward_layernorm", "gate_proj", "up_proj")),
    gain_offset=1.0,
)
PHI3 = replace(
    LLAMA,
    model_types=("phi3",),
    sublayers=(
        _attention("self_attn", "input_layernorm", ("qkv_proj",), "o_proj", "values"),
        _gated("post_attention_layernorm", "gate_up_proj", rows="second half"),
    ),
)
QWEN3_MOE = replace(
    LLAMA,
    model_types=("qwen3_moe", "olmoe"),
    experts=Experts("mlp.experts", "mlp.gate", "num_experts", "post_attention_layernorm"),
)
MIXTRAL = replace(
    LLAMA,
    model_types=("mixtral",),
    experts=Experts("mlp.experts", "mlp.gate", "num_local_experts", "post_attention_layernorm"),
    renames=(
        (".block_sparse_moe.", ".mlp."),
        (".w1.", ".gate_proj."),
        (".w2.", ".down_proj."),
        (".w3.", ".up_proj."),
    ),
)
GPT2 = Family(
    model_types=("gpt2",),
    base="transformer",
    embedding="transformer.wte",
    head="lm_head",
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    transposed=True,
    sublayers=(
        _attention("attn", "ln_1", ("c_attn",), "c_proj", "values"),
        _plain(("mlp",), "ln_2", "mlp.c_fc", "mlp.c_proj", "activation_function"),
    ),
)
OPT = Family(
    model_types=("opt",),
    base="model",
    embedding="model.decoder.embed_tokens",
    head="lm_head",
    blocks="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    sublayers=(
        _attention("self_attn", "self_attn_layer_norm", QKV, "out_proj"),
        _plain(("fc1", "fc2"), "final_layer_norm", "fc1", "fc2", "activation_function"),
    ),
)
GPT_NEOX = Family(
    model_types=("gpt_neox",),
    base="gpt_neox",
    embedding="gpt_neox.embed_in",
    head="lm_head",
    blocks="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    renames=(("embed_out.", "lm_head."),),
    sublayers=(
        _attention("attention", "input_layernorm", ("query_key_value",), "dense", "values by head"),
        _plain(("mlp",), "post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "hidden_act"),
    ),
)

FAMILIES = (LLAMA, GEMMA3, PHI3, GPT2, OPT, GPT_NEOX, MIXTRAL, QWEN3_MOE)


def family_of(config: PretrainedConfig) -> Family:
    """Return the description of the model family that ``config`` names.

    Raises
    ------
    ModelError
        If the architecture, or this variant of it, has no description.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            _refuse_variants(config)
            return family
    known = ", ".join(sorted(t for family in FAMILIES for t in family.model_types))
    raise ModelError(
        f"architecture '{config.model_type}' is not supported",
        f"Supported: {known}. docs/add-a-family.md shows how to describe another",
    )


def _refuse_variants(config: PretrainedConfig) -> None:
    """Refuse what a known architecture can be configured to that its description does not cover."""
    if not getattr(config, "do_layer_norm_before", True):
        raise ModelError("OPT with norms behind the sublayers (as in opt-350m) is not supported")
    if not getattr(config, "layer_norm_elementwise_affine", True):
        raise ModelError("OPT with norms without a gain is not supported")
    if getattr(config, "add_cross_attention", False):
        raise ModelError("GPT-2 with cross-attention is not supported")
