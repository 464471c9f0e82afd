"""The checks that every family's description passes, and a small random model of each family to run them on.

Not for ``frugal check``, which is about methods: the tests and ``docs/add-a-family.md`` use it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frugallm.compress.contract import BlockMethod
from frugallm.compress.plan import Plan
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.conformance.outcome import ensure
from frugallm.conformance.trial import BLOCKS, carry_out, job_for, randomized
from frugallm.errors import ModelError
from frugallm.formats.compressed_tensors import quant_method
from frugallm.formats.decoded import Decoded, Own
from frugallm.formats.engines import loads_in_transformers
from frugallm.formats.folder import write_dense
from frugallm.formats.packed_folder import load_packed
from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme
from frugallm.formats.stored import model_in_memory
from frugallm.models.in_memory import InMemory
from frugallm.models.linears import to_plain
from frugallm.models.offgrid import Offgrid
from frugallm.models.open import dense_model, load_plain
from frugallm.models.safetensors_folder import SafetensorsFolder
from frugallm.walk.walk import Walk

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class _Rounding(BlockMethod):
    """4 bits in groups of 16, by the inputs' mean squares: a solver that reads statistics of every site."""

    solves = "step"
    solve_needs = frozenset({"second_moment"})

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        return WeightScheme(bits=4, group_size=16)

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        return round_to_nearest(weight, scheme, "mse", statistics["second_moment"].diagonal())


NOTHING = Plan(rewrites=(), linears={}, tables={}, left_alone=())

#: Odd widths, grouped heads where the family has them; what is left out has the family's default.
_LLAMA: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_OPT = {key: value for key, value in _NEOX.items() if key != "intermediate_size"} | {
    "ffn_dim": 160,
    "word_embed_proj_dim": 96,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}
#: Name of a variant to model type and configuration. Windows of 48 tokens are longer than the sliding ones.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 16, "head_dim": 24}),
    "qwen2, tied": ("qwen2", _LLAMA | {"tie_word_embeddings": True}),
    "qwen2, sliding": (
        "qwen2",
        _LLAMA | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 32, "attention_bias": True}),
    "gemma3": (
        "gemma3_text",
        _LLAMA
        | {
            "head_dim": 32,
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", _LLAMA | {"pad_token_id": 0, "sliding_window": 16}),
    "gpt2": (
        "gpt2",
        {"vocab_size": 67, "n_embd": 96, "n_layer": BLOCKS, "n_head": 6, "n_positions": 128, "n_inner": 160},
    ),
    "opt": ("opt", _OPT),
    "opt, gelu, untied": ("opt", _OPT | {"activation_function": "gelu", "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox, one after the other": (
        "gpt_neox",
        _NEOX | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "mixtral": ("mixtral", _LLAMA | _EXPERTS | {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", _LLAMA | _EXPERTS | {"num_experts": 5, "moe_intermediate_size": 48}),
    "qwen3_moe, one expert": (
        "qwen3_moe",
        _LLAMA | {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 48},
    ),
    "qwen3_moe, first block dense": (
        "qwen3_moe",
        _LLAMA | _EXPERTS | {"num_experts": 5, "moe_intermediate_size": 48, "mlp_only_layers": [0]},
    ),
    "olmoe": ("olmoe", _LLAMA | _EXPERTS | {"num_experts": 4}),
    "olmoe, clipped": ("olmoe", _LLAMA | _EXPERTS | {"num_experts": 4, "clip_qkv": 0.5}),
}


def variant(name: str) -> Any:
    """Return the small random model of that name, float32."""
    from transformers import CONFIG_MAPPING

    kind, fields = VARIANTS[name]
    make: Any = CONFIG_MAPPING[kind]
    config = make(bos_token_id=1, eos_token_id=2, **fields)
    return randomized(config, seed=list(VARIANTS).index(name))


def tokens() -> Tensor:
    """Return calibration windows ``(6, 48)`` of random tokens."""
    return torch.randint(67, (6, 48), generator=torch.Generator().manual_seed(7))


# -- what every description has to bear; each check takes a model and an empty folder ------------------------------------


def a_saved_folder_holds_the_same_tensors(model: Any, scratch: Path) -> None:
    """Names, orientation and fused parameters of files are those of the model in memory."""
    model.save_pretrained(scratch)
    checkpoint, folder = InMemory(model), SafetensorsFolder(scratch)
    folder.validate()
    ensure(folder.names() == checkpoint.names(), "the folder has other names")
    for name in folder.names():
        same = folder.shape(name) == checkpoint.shape(name)
        ensure(same and torch.equal(folder.tensor(name), checkpoint.tensor(name)), f"{name} differs")


def every_matrix_of_a_block_is_a_linear_or_stays(model: Any, scratch: Path) -> None:
    """No weight is missed: what is no linear of a site must be named among a site's other readers."""
    checkpoint = InMemory(model)
    checkpoint.validate()
    family, config = checkpoint.family, checkpoint.config
    known = {f"{path}.weight" for path in checkpoint.linears()}
    for index in range(config.num_hidden_layers):
        others = [o for site in family.sites(config, index) for o in site.others]
        known |= {f"{family.block(index)}.{path}.weight" for path in others}
    blocks = f"{family.blocks}."
    found = {n for n in checkpoint.names() if n.startswith(blocks) and len(checkpoint.shape(n)) > 1}
    ensure(found == known, f"not described: {sorted(found ^ known)}")


def a_filled_model_computes_the_same(model: Any, scratch: Path) -> None:
    """The model built from the checkpoint has the same logits to the last bit."""
    ensure(torch.equal(_logits(dense_model(InMemory(model))), _logits(model)), "the logits differ")


def blocks_run_piece_by_piece_as_the_plain_model_does(model: Any, scratch: Path) -> None:
    """The walk's hidden states behind every block are those of the plain model."""
    checkpoint = InMemory(model)
    family = checkpoint.family
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(out))
        for block in model.get_submodule(family.blocks)
    ]
    _logits(model)
    for hook in hooks:
        hook.remove()
    walk = Walk(checkpoint, NOTHING, tokens(), scratch, fast=torch.float32, stored=torch.float32)
    walk.embed(lambda start, stop: checkpoint.rows(f"{family.embedding}.weight", start, stop))
    for index in range(len(walk)):
        walk.solve(index)
        assert walk.hidden is not None
        ensure(_close(walk.hidden.values, seen[index]), f"block {index} puts out something else")


def folds_leave_the_logits(model: Any, scratch: Path) -> None:
    """A random scale folded into every writer, and a shift into all biases that take one, change weights and no more."""
    checkpoint = InMemory(model)
    walk = Walk(checkpoint, NOTHING, None, scratch, fast=torch.float32)
    folded = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    generator = torch.Generator().manual_seed(0)
    for index in range(len(walk)):
        block = walk.load(index)
        for site in block.sites:
            if site.writer is None:
                continue
            before = block.weight(site.name).clone()
            block.scale_site(site, torch.exp(torch.rand(before.shape[1], generator=generator) * 2 - 1))
            ensure(not _close(block.weight(site.name), before, 1e-2), f"{site.name} was not scaled")
            if block.takes_shift(site):
                bias = block.state[f"{site.writer}.bias"]
                block.shift_site(site, torch.randn(before.shape[1], generator=generator))
                moved = not _close(block.state[f"{site.writer}.bias"], bias, 1e-2)
                ensure(moved, f"the input of {site.name} was not shifted")
        folded |= {block.full_name(n): tensor for n, tensor in block.state.items()}
    filled = dense_model(checkpoint)
    filled.load_state_dict(to_plain(checkpoint.family, folded, folded.__getitem__), strict=False)
    ensure(_close(_logits(filled), _logits(model), 1e-4), "the logits moved")


def the_offgrid_variant_computes_the_same(model: Any, scratch: Path) -> None:
    """``-offgrid`` has other weights and the same logits."""
    checkpoint = InMemory(model)
    offgrid = Offgrid(checkpoint)
    first = f"{checkpoint.linears()[0]}.weight"
    ensure(not torch.equal(offgrid.tensor(first), checkpoint.tensor(first)), "the weights are the same")
    ensure(_close(_logits(dense_model(offgrid)), _logits(model), 1e-4), "the logits moved")


def a_dense_copy_loads_in_plain_transformers(model: Any, scratch: Path) -> None:
    """What is written uncompressed is an ordinary folder of that family."""
    write_dense(InMemory(model), scratch / "dense", torch.float32)
    same = torch.equal(_logits(load_plain(scratch / "dense", torch.float32)), _logits(model))
    ensure(same, "the logits differ")


def a_run_is_read_back_as_it_was_kept(model: Any, scratch: Path) -> None:
    """Every linear is compressed; the folder loads to the same logits, or plain ``transformers`` refuses it."""
    checkpoint = InMemory(model)
    run = carry_out(job_for(checkpoint, [_Rounding()], tokens()), scratch / "out")
    ensure(list(run.job.plan.linears) == checkpoint.linears(), "not every linear was compressed")
    kept = _logits(model_in_memory(run.place.stored(run.job)))
    reader = Own if quant_method(run.job.plan) == Own.method else Decoded
    read = load_packed(reader(run.folder), torch.float32)
    ensure(torch.equal(_logits(read), kept), "read back differently")
    if loads_in_transformers(run.job.plan):
        plain = _logits(load_plain(run.folder, torch.float32))
        ensure(_close(plain, kept), "plain transformers computes something else")
        return
    ensure(reader.only_read_here(run.folder), "the folder does not say that only FrugalLM reads it")
    try:
        load_plain(run.folder, torch.float32)
    except ModelError:
        return
    ensure(False, "plain transformers loads it without the stored values")


CHECKS: tuple[Callable[[Any, Path], None], ...] = (
    a_saved_folder_holds_the_same_tensors,
    every_matrix_of_a_block_is_a_linear_or_stays,
    a_filled_model_computes_the_same,
    blocks_run_piece_by_piece_as_the_plain_model_does,
    folds_leave_the_logits,
    the_offgrid_variant_computes_the_same,
    a_dense_copy_loads_in_plain_transformers,
    a_run_is_read_back_as_it_was_kept,
)


def check_family(config: PretrainedConfig, seed: int = 0) -> list[str]:
    """Run every check on a small random model.

    Parameters
    ----------
    config
        A small configuration with a vocabulary of 67 or more and a context of 48 or more.
    seed
        Chooses the weights.

    Returns
    -------
    list of str
        The names of the checks.

    Raises
    ------
    CheckFailed
        At the first check that fails; it says how.
    """
    model = randomized(config, seed)
    for check in CHECKS:
        with tempfile.TemporaryDirectory(prefix="frugallm-family-") as scratch:
            check(model, Path(scratch))
    return [check.__name__ for check in CHECKS]


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def _close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
