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
    rotary
        Last part of the path of linears whose rows lie rotary pair by rotary pair, to the attribute that counts their
        heads.
    computed
        Attributes of the configuration that llama.cpp takes for granted, with the value that it takes.
    window
        Attribute with the number of tokens that attention looks back, which llama.cpp does not limit.
    own_head
        Whether llama.cpp wants a head of its own even where it is the embedding.
    differs
        Each says in one clause what a configuration asks for that llama.cpp does not compute, or nothing.
    """

    architecture: MODEL_ARCH
    numbers: Mapping[str, str]
    rotary: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Any] = field(default_factory=dict)
    window: str | None = None
    own_head: bool = False
    differs: tuple[Callable[[PretrainedConfig], str | None], ...] = ()

    @property
    def name(self) -> str:
        """What the file calls the architecture."""
        return MODEL_ARCH_NAMES[self.architecture]

    def metadata(self, config: PretrainedConfig) -> dict[str, int | float]:
        """Return the hyper-parameters under their full keys."""
        found: dict[str, int | float] = {key: getattr(config, name) for key, name in self.numbers.items()}
        heads = Heads.of(config)
        found |= {"attention.head_count": heads.query, "attention.head_count_kv": heads.values}
        found |= dict.fromkeys(OF_A_HEAD, heads.width)
        found["rope.freq_base"] = float(config.rope_parameters["rope_theta"])
        return {f"{self.name}.{key}": value for key, value in found.items()}

    def notes(self, config: PretrainedConfig) -> list[str]:
        """Say what llama.cpp will compute otherwise."""
        back = getattr(config, self.window, None) if self.window else None
        if back is None or back >= config.max_position_embeddings:
            return []
        return [
            f"attention looks back {back} tokens in this model and without limit in llama.cpp: "
            "longer texts are computed otherwise there"
        ]

    def row_order(self, name: str, rows: int, config: PretrainedConfig) -> np.ndarray | None:
        """Say which row of ``transformers`` is which row of the file; ``None``: they are the same.

        ``transformers`` keeps the two halves of a rotary pair half a head apart, llama.cpp side by side.
        """
        attribute = self.rotary.get(name.split(".")[-2])
        if attribute is None:
            return None
        heads = getattr(config, attribute)
        return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


DECODER = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
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


OF_A_HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
LLAMA = GGUFFamily(
    MODEL_ARCH.LLAMA,
    DECODER,
    rotary={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
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
        if getattr(config, name, value) != value:
            raise ExportError(
                f"{checkpoint.name}: {name} is {getattr(config, name)}, llama.cpp computes {value} in '{family.name}'",
                "Hand it on in another format",
            )
    for difference in filter(None, (differs(config) for differs in family.differs)):
        raise ExportError(
            f"{checkpoint.name}: {difference}, which llama.cpp does not compute in '{family.name}'",
            "Hand it on in another format",
        )
    rotary = config.rope_parameters["rope_type"]
    if rotary != "default":
        raise ExportError(
            f"{checkpoint.name}: rotary frequencies scaled by '{rotary}' are not written as GGUF yet",
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
