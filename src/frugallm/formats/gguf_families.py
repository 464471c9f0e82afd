"""What GGUF calls the parts of a model: one row per model family.

A row names llama.cpp's architecture, its hyper-parameters and the linears whose rows lie in another order; names of tensors
come from the ``gguf`` package. A family that has no row is refused, and so is a model that computes what llama.cpp does not:
what it computes is in its ``src/models``, one file per architecture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from frugallm.errors import ExportError
from frugallm.formats.gguf_rotary import Rotary, rotary
from frugallm.models.family import Heads, has_experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from frugallm.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class GGUFFamily:
    """How a model of one family is described in GGUF.

    Attributes
    ----------
    architecture
        Its name in llama.cpp.
    numbers
        Key, without the architecture in front, to the attribute of the configuration that it holds.
    more
        Returns further keys and values.
    paired
        Last part of the path of linears whose rows lie rotary pair by rotary pair, to the attribute that counts their
        heads.
    by_head
        Last part of the path of a fused linear that ``transformers`` keeps head by head, ``[q k v | q k v | …]``, and
        llama.cpp as ``[q | k | v]``.
    scaling, partial
        Kinds of rotary positions that it computes, and whether they may leave a part of a head as it is.
    computed
        Attributes of the configuration that llama.cpp takes for granted, with the value that it takes, or a tuple of
        values that come to the same.
    window
        Attribute with the number of tokens that attention looks back, which llama.cpp does not limit.
    own_head
        Whether llama.cpp wants a head of its own even where it is the embedding.
    differs
        Each says in one clause what a configuration asks for that llama.cpp does not compute, or nothing.
    """

    architecture: MODEL_ARCH
    numbers: Mapping[str, str]
    more: Callable[[PretrainedConfig], dict[str, Any]] = lambda _: {}
    paired: Mapping[str, str] = field(default_factory=dict)
    by_head: tuple[str, ...] = ()
    scaling: tuple[str, ...] = ("default", "linear", "yarn")
    partial: bool = False
    computed: Mapping[str, Any] = field(default_factory=dict)
    window: str | None = None
    own_head: bool = False
    differs: tuple[Callable[[PretrainedConfig], str | None], ...] = ()

    @property
    def name(self) -> str:
        """What the file calls the architecture."""
        return MODEL_ARCH_NAMES[self.architecture]

    def metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """Return the hyper-parameters under their full keys."""
        heads = Heads.of(config)
        found: dict[str, Any] = {key: getattr(config, name) for key, name in self.numbers.items()}
        found |= {"attention.head_count": heads.query, "attention.head_count_kv": heads.values}
        found |= {"attention.key_length": heads.width, "attention.value_length": heads.width}
        found |= self.positions(config).metadata | self.more(config)
        return {f"{self.name}.{key}": value for key, value in found.items()}

    def positions(self, config: PretrainedConfig) -> Rotary:
        """Return what the file says about rotary positions."""
        return rotary(config, Heads.of(config).width, self.scaling, partial=self.partial)

    def notes(self, config: PretrainedConfig) -> list[str]:
        """Say what llama.cpp will compute otherwise."""
        found = list(self.positions(config).notes)
        if getattr(config, "hidden_act", None) == "gelu":
            found.append(
                "the GELU of this model is the exact one, llama.cpp computes its tanh form: within 0.0005"
            )
        back = getattr(config, self.window, None) if self.window else None
        if back is not None and back < config.max_position_embeddings:
            found.append(
                f"attention looks back {back} tokens in this model and without limit in llama.cpp: "
                "longer texts are computed otherwise there"
            )
        return found

    def row_order(self, name: str, rows: int, config: PretrainedConfig) -> np.ndarray | None:
        """Say which row of ``transformers`` is which row of the file; ``None``: they are the same.

        ``transformers`` keeps the two halves of a rotary pair half a head apart, llama.cpp's llama side by side.
        """
        linear = name.split(".")[-2]
        if linear in self.by_head:
            return np.arange(rows).reshape(Heads.of(config).query, 3, -1).swapaxes(0, 1).reshape(-1)
        if linear not in self.paired:
            return None
        heads = getattr(config, self.paired[linear])
        return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


PLAIN = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
}
DECODER = PLAIN | {
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
#: What ``transformers`` calls the form of GELU that llama.cpp computes.
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}


def _narrow_heads(config: PretrainedConfig) -> str | None:
    heads = Heads.of(config)
    if heads.query * heads.width == config.hidden_size:
        return None
    return f"{heads.query} heads of {heads.width} are not as wide as the model ({config.hidden_size})"


def _grouped_heads(config: PretrainedConfig) -> str | None:
    heads = Heads.of(config)
    return None if heads.repeats == 1 else f"{heads.values} key heads serve {heads.query} heads"


def _dense_blocks(config: PretrainedConfig) -> str | None:
    dense = [i for i in range(config.num_hidden_layers) if not has_experts(config, i)]
    return f"block {dense[0]} has no experts" if dense else None


def _gemma_scale(config: PretrainedConfig) -> str | None:
    heads = Heads.of(config)
    scale = config.hidden_size // heads.query if config.num_hidden_layers == GEMMA_27B else heads.width
    if config.query_pre_attn_scalar == scale:
        return None
    return f"query_pre_attn_scalar is {config.query_pre_attn_scalar} and not {scale}"


def _gemma_windows(config: PretrainedConfig) -> dict[str, Any]:
    """Say which blocks look back only so far; the pattern is left out where it is what llama.cpp expects."""
    cap = config.final_logit_softcapping
    found: dict[str, Any] = {"final_logit_softcapping": float(cap)} if cap else {}
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    if not any(sliding):
        return found
    found["attention.sliding_window"] = config.sliding_window
    if sliding != [(block + 1) % 6 != 0 for block in range(len(sliding))]:
        found["attention.sliding_window_pattern"] = sliding
    return found


#: Blocks of the one size of Gemma 3 that scales its queries otherwise.
GEMMA_27B = 62
LLAMA = GGUFFamily(
    MODEL_ARCH.LLAMA,
    DECODER,
    paired={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
    scaling=("default", "linear", "yarn", "llama3", "longrope"),
    computed={"hidden_act": "silu"},
)
QWEN = {"hidden_act": "silu", "use_sliding_window": False}
QWEN3 = QWEN | {"attention_bias": False}
FAMILIES = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, window="sliding_window"),
    "qwen2": GGUFFamily(MODEL_ARCH.QWEN2, DECODER, computed=QWEN, differs=(_narrow_heads,)),
    "qwen3": GGUFFamily(MODEL_ARCH.QWEN3, DECODER, computed=QWEN3),
    "mixtral": replace(
        LLAMA,
        numbers=DECODER | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        window="sliding_window",
    ),
    "qwen3_moe": GGUFFamily(
        MODEL_ARCH.QWEN3MOE,
        DECODER | EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"},
        computed=QWEN3 | {"norm_topk_prob": True},
        differs=(_dense_blocks,),
    ),
    "olmoe": GGUFFamily(
        MODEL_ARCH.OLMOE,
        DECODER | EXPERTS,
        computed={"hidden_act": "silu", "norm_topk_prob": False, "clip_qkv": None, "attention_bias": False},
        own_head=True,
        differs=(_narrow_heads, _grouped_heads),
    ),
    "gemma3_text": GGUFFamily(
        MODEL_ARCH.GEMMA3,
        DECODER,
        more=_gemma_windows,
        scaling=("default", "linear"),
        computed={
            "hidden_activation": TANH_GELU,
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": (False, None),
        },
        differs=(_gemma_scale,),
    ),
    "phi3": GGUFFamily(
        MODEL_ARCH.PHI3,
        DECODER,
        more=lambda config: {"attention.sliding_window": config.sliding_window or 0},
        scaling=("default", "longrope"),
        partial=True,
        computed={"hidden_act": "silu"},
        window="sliding_window",
        differs=(_narrow_heads,),
    ),
    "gpt2": GGUFFamily(
        MODEL_ARCH.GPT2,
        PLAIN | {"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        more=lambda config: {"feed_forward_length": config.n_inner or 4 * config.n_embd},
        scaling=(),
        computed={
            "activation_function": TANH_GELU,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        },
    ),
    "gpt_neox": GGUFFamily(
        MODEL_ARCH.GPTNEOX,
        PLAIN
        | {
            "feed_forward_length": "intermediate_size",
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
        by_head=("query_key_value",),
        partial=True,
        computed={"hidden_act": (*TANH_GELU, "gelu"), "attention_bias": True},
        own_head=True,
    ),
}
#: Families that no row can be written for.
UNKNOWN_TO_LLAMA_CPP = ("opt",)


def gguf_family(checkpoint: Checkpoint) -> GGUFFamily:
    """Return the row of a model's family.

    Raises
    ------
    ExportError
        If there is none, or the model computes something that llama.cpp does not.
    """
    config, kind = checkpoint.config, checkpoint.config.model_type
    if kind not in FAMILIES:
        why = "llama.cpp has no such architecture" if kind in UNKNOWN_TO_LLAMA_CPP else "not written yet"
        raise ExportError(
            f"{checkpoint.name}: architecture '{kind}' cannot be written as GGUF ({why})",
            f"Written: {', '.join(FAMILIES)}",
        )
    family = FAMILIES[kind]
    for name, value in family.computed.items():
        taken = value if isinstance(value, tuple) else (value,)
        if getattr(config, name, taken[0]) not in taken:
            raise ExportError(
                f"{checkpoint.name}: {name} is {getattr(config, name)}, llama.cpp computes {taken[0]} in "
                f"'{family.name}'",
                "Hand it on in another format",
            )
    differences = (*(differs(config) for differs in family.differs), family.positions(config).differs)
    for difference in filter(None, differences):
        raise ExportError(
            f"{checkpoint.name}: {difference}, which llama.cpp does not compute in '{family.name}'",
            "Hand it on in another format",
        )
    return family


def stored_tensors(checkpoint: Checkpoint, family: GGUFFamily) -> dict[str, tuple[str, ...]]:
    """Map the name of each tensor of the file, in the order of computation, to the tensors that make it.

    That is one, or the same linear of all experts of a block.
    """
    known = get_tensor_name_map(family.architecture, checkpoint.config.num_hidden_layers)
    found: dict[str, tuple[str, ...]] = {}

    def add(name: str, place: str) -> None:
        stored = known.get_name(place, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ExportError(f"{checkpoint.name}: {name} has no place in a GGUF file of '{family.name}'")
        found[stored] = (*found.get(stored, ()), name)

    for name in _in_order(checkpoint):
        add(name, ONE_EXPERT.sub(".experts.", name))
    if family.own_head and checkpoint.config.tie_word_embeddings:
        add(f"{checkpoint.family.embedding}.weight", f"{checkpoint.family.head}.weight")
    return found


ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def _in_order(checkpoint: Checkpoint) -> list[str]:
    blocks = f"{checkpoint.family.blocks}."

    def place(name: str) -> tuple[int, list[tuple[int, str]]]:
        parts = [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
        if name.startswith(blocks):
            return 1, parts
        return (0 if name.startswith(f"{checkpoint.family.embedding}.") else 2), parts

    return sorted(checkpoint.names(), key=place)
