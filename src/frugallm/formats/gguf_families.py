"""What GGUF calls the parts of a model: one row per model family.

A row names llama.cpp's architecture, its hyper-parameters and the linears whose rows lie in another order; names of tensors
come from the ``gguf`` package. A family that has no row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from frugallm.errors import ExportError
from frugallm.models.family import Heads

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
    """

    architecture: MODEL_ARCH
    numbers: Mapping[str, str]
    rotary: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Any] = field(default_factory=dict)
    window: str | None = None

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
OF_A_HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
LLAMA = GGUFFamily(
    MODEL_ARCH.LLAMA,
    DECODER,
    rotary={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
    computed={"hidden_act": "silu"},
)
QWEN = {"hidden_act": "silu", "use_sliding_window": False}
FAMILIES = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, window="sliding_window"),
    "qwen2": GGUFFamily(MODEL_ARCH.QWEN2, DECODER, computed=QWEN),
    "qwen3": GGUFFamily(MODEL_ARCH.QWEN3, DECODER, computed=QWEN | {"attention_bias": False}),
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
    rotary = config.rope_parameters["rope_type"]
    if rotary != "default":
        raise ExportError(
            f"{checkpoint.name}: rotary frequencies scaled by '{rotary}' are not written as GGUF yet",
            "Hand it on in another format",
        )
    return family


def stored_names(checkpoint: Checkpoint, family: GGUFFamily) -> dict[str, str]:
    """Map the name of each tensor, in the order of computation, to its name in the file."""
    blocks = checkpoint.config.num_hidden_layers
    known = get_tensor_name_map(family.architecture, blocks)
    names: dict[str, str] = {}
    for name in _in_order(checkpoint):
        stored = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ExportError(f"{checkpoint.name}: {name} has no place in a GGUF file of '{family.name}'")
        names[name] = stored
    return names


def _in_order(checkpoint: Checkpoint) -> list[str]:
    blocks = f"{checkpoint.family.blocks}."

    def place(name: str) -> tuple[int, int, str]:
        if name.startswith(blocks):
            return 1, int(name.removeprefix(blocks).split(".")[0]), name
        return (0 if name.startswith(f"{checkpoint.family.embedding}.") else 2), 0, name

    return sorted(checkpoint.names(), key=place)
