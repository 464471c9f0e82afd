"""What a native step computes: a decoder of the Llama or Gemma 3 kind as packed weights and a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from frugallm.errors import ModelError
from frugallm.formats.decoded import Decoded
from frugallm.formats.gguf_families import TANH_GELU
from frugallm.formats.packed_folder import PackedFolder
from frugallm.kernels.gguf_codes import gguf_codes
from frugallm.kernels.memory import Room
from frugallm.kernels.packing import Codes, PackedLinear, in_turns, joined, pack_weight, packable
from frugallm.models.checkpoint import Checkpoint, meta_model
from frugallm.models.family import Heads
from frugallm.models.gguf_file import GGUFFile
from frugallm.models.in_memory import InMemory

#: Values of ``model_type`` that a native step computes.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
#: What becomes of gate and up, by the name of the activation function.
ACTIVATIONS: dict[str, Literal["silu_mul", "gelu_mul"]] = {
    **dict.fromkeys(("silu", "swish"), "silu_mul"),
    **dict.fromkeys(TANH_GELU, "gelu_mul"),
}
#: Rotary positions whose frequencies follow from a token's own position.
ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
WIDEST_HEAD = 256
ELSEWHERE = "Run it through transformers"


@dataclass(frozen=True)
class DecoderLayer:
    """One block: ``x += output(attention(qkv(norm(x))))``, ``x += down(act(gate) * up)`` of ``second_norm(x)``.

    Attributes
    ----------
    qkv
        Rows of query, key and value projections, one after the other.
    output, down
        What is added to the stream.
    gate_up
        Rows of gate and up projections in turns of 16 (:func:`~frugallm.kernels.packing.in_turns`).
    norm, second_norm
        Gains ``(hidden,)`` float32.
    query_norm, key_norm
        Gains ``(head,)`` of norms of every head before it is rotated, or ``None``.
    output_norm, down_norm
        Gains ``(hidden,)`` of norms of what is added to the stream, or, in all layers, ``None``.
    rotation
        Which of the decoder's rotations it has.
    window
        Positions that a token sees, its own included; 0: all.
    """

    qkv: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    norm: Tensor
    second_norm: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    output_norm: Tensor | None = None
    down_norm: Tensor | None = None
    rotation: int = 0
    window: int = 0


@dataclass(frozen=True)
class Decoder:
    """A whole decoder.

    Attributes
    ----------
    layers
        Its blocks.
    embedding, head
        Tables ``(vocabulary, hidden)``; one object where they are tied.
    last_norm
        Gain ``(hidden,)``.
    cos, sin
        Rotations of every position, float32 ``(rotations, positions, head / 2)``.
    heads
        Heads of queries and of keys, and the width of one.
    hidden, inner
        Widths of the stream and between gate and down.
    eps
        What norms add to a mean square.
    scale
        What scores of attention are multiplied by; ``None``: one over the root of a head's width.
    embed_scale
        What rows of the table are multiplied by where they begin the stream.
    activation
        What becomes of gate and up.
    """

    layers: tuple[DecoderLayer, ...]
    embedding: PackedLinear
    head: PackedLinear
    last_norm: Tensor
    cos: Tensor
    sin: Tensor
    heads: Heads
    hidden: int
    inner: int
    eps: float
    scale: float | None = None
    embed_scale: float = 1.0
    activation: Literal["silu_mul", "gelu_mul"] = "silu_mul"

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        linears = [w for layer in self.layers for w in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        tables = {id(table): table for table in (self.embedding, self.head)}.values()
        return sum(w.nbytes for w in (*linears, *tables))


def why_not(config: Any) -> str:
    """Return why a native step cannot compute a model of this configuration, or nothing."""
    if config.model_type not in MODEL_TYPES:
        return f"there is no native step for the architecture '{config.model_type}'"
    rotary = _rotary_parameters(config).values()
    kind = next((p["rope_type"] for p in rotary if p.get("rope_type", "default") not in ROTARY_TYPES), None)
    if kind is not None:
        return f"rotary positions of type '{kind}' change with the length of a text"
    if any(p.get("partial_rotary_factor", 1.0) != 1.0 for p in (*rotary, vars(config))):
        return "it rotates a part of each head only"
    if _activation(config) not in ACTIVATIONS:
        return f"there is no kernel for the activation function '{_activation(config)}'"
    if any(getattr(config, f"{what}_logit_softcapping", None) for what in ("attn", "final")):
        return "there is no kernel for scores or logits that are capped"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention looks ahead"
    width = Heads.of(config).width
    if width % 2 or width > WIDEST_HEAD:
        return f"its heads are {width} wide; there is a kernel for even widths up to {WIDEST_HEAD}"
    return ""


def read_decoder(checkpoint: Checkpoint, positions: int | None = None) -> Decoder:
    """Pack the weights of a checkpoint: of a compressed folder by its codes, of a plain one as they are.

    Parameters
    ----------
    checkpoint
        As :func:`frugallm.models.open_checkpoint` returns it with ``compressed=True``.
    positions
        Longest text, in tokens; ``None``: what the configuration says.

    Raises
    ------
    ModelError
        If a native step does not compute such a model.
    """
    config = checkpoint.config
    if reason := why_not(config):
        raise ModelError(f"{checkpoint.name}: {reason}", ELSEWHERE)
    room = Room()
    embedding = _table(checkpoint, checkpoint.family.embedding, room)
    head = embedding if config.tie_word_embeddings else _table(checkpoint, checkpoint.family.head, room)
    plain, heads = meta_model(checkpoint), Heads.of(config)
    cos, sin = _rotations(checkpoint, plain, positions or config.max_position_embeddings)
    return Decoder(
        layers=tuple(_layer(checkpoint, index, room) for index in range(config.num_hidden_layers)),
        embedding=embedding,
        head=head,
        last_norm=_gain(checkpoint, checkpoint.family.final_norm),
        cos=cos,
        sin=sin,
        heads=heads,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        eps=config.rms_norm_eps,
        scale=getattr(config, "query_pre_attn_scalar", heads.width) ** -0.5,
        embed_scale=_embed_scale(checkpoint, plain),
        activation=ACTIVATIONS[_activation(config)],
    )


def _activation(config: Any) -> str:
    """Return the name of the activation function, which Gemma's configurations have in another place."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _rotary_parameters(config: Any) -> dict[str, dict[str, Any]]:
    """Return what is said about rotary positions for each kind of layers; one for all has no name."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {kind: p for kind, p in parameters.items() if isinstance(p, dict)}
    return {kind: p for kind, p in kinds.items() if kind in config.layer_types} or {"": parameters}


def _rotations(checkpoint: Checkpoint, plain: Any, positions: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position, float32 ``(rotations, positions, head / 2)``, as the plain model has them."""
    rotary = plain.get_submodule(f"{checkpoint.family.base}.rotary_emb")
    half, places = Heads.of(plain.config).width // 2, torch.arange(positions)[None]
    kinds = _rotary_parameters(plain.config)
    found = [rotary(torch.empty(0), places, *filter(None, [kind])) for kind in kinds]
    cos, sin = (torch.stack([part[0, :, :half] for part in parts]) for parts in zip(*found))
    return cos, sin


def _embed_scale(checkpoint: Checkpoint, plain: Any) -> float:
    """Return what rows of the table are multiplied by, in the type in which the plain model computes.

    That is float32 unless it was loaded otherwise.
    """
    path = checkpoint.family.embedding
    scale = getattr(plain.get_submodule(path), "embed_scale", None)
    if scale is None:
        return 1.0
    loaded = isinstance(checkpoint, InMemory)
    return float(scale.to(checkpoint.rows(f"{path}.weight", 0, 1).dtype if loaded else torch.float32))


def _gain(checkpoint: Checkpoint, path: str) -> Tensor:
    return checkpoint.family.gain_offset + checkpoint.tensor(f"{path}.weight").float()


def _layer(checkpoint: Checkpoint, index: int, room: Room) -> DecoderLayer:
    block = checkpoint.family.block(index)
    names = set(checkpoint.names())

    def packed(paths: Sequence[str], turns: bool = False) -> PackedLinear:
        weights = joined([_weight(checkpoint, f"{block}.{path}") for path in paths])
        biases = [_optional(checkpoint, names, f"{block}.{path}.bias") for path in paths]
        bias = None
        if any(b is not None for b in biases):
            rows = [checkpoint.shape(f"{block}.{path}.weight")[0] for path in paths]
            bias = torch.cat([torch.zeros(n) if b is None else b for n, b in zip(rows, biases)])
        if turns:
            weights, bias = in_turns(weights), None if bias is None else in_turns(bias)  # type: ignore[assignment]
        return pack_weight(weights, bias).moved(room)

    def norm(path: str) -> Tensor | None:
        return _gain(checkpoint, f"{block}.{path}") if f"{block}.{path}.weight" in names else None

    kinds = list(_rotary_parameters(checkpoint.config))
    down_norm = norm("post_feedforward_layernorm")
    return DecoderLayer(
        qkv=packed([f"self_attn.{part}_proj" for part in "qkv"]),
        output=packed(["self_attn.o_proj"]),
        gate_up=packed(["mlp.gate_proj", "mlp.up_proj"], turns=True),
        down=packed(["mlp.down_proj"]),
        norm=_gain(checkpoint, f"{block}.input_layernorm"),
        second_norm=_gain(checkpoint, f"{block}.{checkpoint.family.sublayers[1].reads.writer}"),
        query_norm=norm("self_attn.q_norm"),
        key_norm=norm("self_attn.k_norm"),
        # Where there is none behind the feed-forward part, the one of this name stands in front of it.
        output_norm=None if down_norm is None else norm("post_attention_layernorm"),
        down_norm=down_norm,
        rotation=kinds.index(checkpoint.config.layer_types[index]) if len(kinds) > 1 else 0,
        window=_window(checkpoint.config, index),
    )


def _weight(checkpoint: Checkpoint, path: str) -> Codes | Tensor:
    """Return a linear's codes where it has some, else its values."""
    if isinstance(checkpoint, Decoded) and (scheme := checkpoint.scheme(path)) is not None:
        inputs = scheme.activations
        if inputs is not None and (
            (inputs.grid, inputs.bits) != ("int", 8)
            or inputs.outliers is not None
            or inputs.clusters is not None
            or inputs.reassembled
            or inputs.rotation is not None
        ):
            raise ModelError(
                f"{checkpoint.where(f'{path}.weight')}: there is no kernel for inputs rounded as {inputs.label()}",
                ELSEWHERE,
            )
    if isinstance(checkpoint, PackedFolder) and (stored := checkpoint.quantized(path)) is not None:
        return packable(stored)
    if isinstance(checkpoint, GGUFFile):
        kind, raw = checkpoint.stored(f"{path}.weight")
        if (codes := gguf_codes(kind, raw)) is not None:
            if not all(bool(x.isfinite().all()) for x in (codes.scales, codes.zeros) if x is not None):
                raise ModelError(
                    f"{checkpoint.where(f'{path}.weight')}: {path}.weight holds NaN or infinite values",
                    "Get an intact copy of the model",
                )
            return codes
        return checkpoint.tensor(f"{path}.weight").to(torch.bfloat16 if kind == "BF16" else torch.float32)
    return checkpoint.tensor(f"{path}.weight")


def _table(checkpoint: Checkpoint, path: str, room: Room) -> PackedLinear:
    return pack_weight(_weight(checkpoint, path)).moved(room)


def _optional(checkpoint: Checkpoint, names: set[str], name: str) -> Tensor | None:
    return checkpoint.tensor(name).float() if name in names else None


def _window(config: Any, index: int) -> int:
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[index] != "sliding_attention":
        return 0
    return getattr(config, "sliding_window", None) or 0
