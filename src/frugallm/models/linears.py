"""Every linear-like parameter as a linear: GPT-2's ``Conv1D`` turned round, the fused experts of a mixture taken apart.

Methods, formats and reports see one form of model, in which each compressible weight is ``(out, in)`` under a name of its
own. ``transformers`` keeps ``Conv1D`` weights as ``(in, out)`` and all experts of a block in two three-dimensional
parameters, which a pass that looks for ``nn.Linear`` misses. The names and shapes of both forms meet here and nowhere else:

=============================== ============================ ======================================================
plain ``transformers``          here                         in files
=============================== ============================ ======================================================
``attn.c_attn.weight (in, out)``  ``attn.c_attn.weight (out,   as in ``transformers``
                                in)``
``experts.gate_up_proj          ``experts.0.gate_proj.       one by one, under the names of the published files
(experts, 2 inner, in)``        weight``, ``…up_proj…``      (``Family.renames``)
``experts.down_proj             ``experts.0.down_proj.       the same
(experts, out, inner)``         weight``
=============================== ============================ ======================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from frugallm.models.family import Family

LEAVES = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """One gated feed-forward network ``(tokens, width)`` to ``(tokens, width)``."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return ``down(act(gate(x)) * up(x))``."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ExpertList(nn.ModuleList):
    """The experts of a block one by one; called like the fused module of ``transformers`` in whose place it stands."""

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, ``(tokens, width)``.

        Parameters
        ----------
        x
            ``(tokens, width)``.
        top_k_index, top_k_weights
            ``(tokens, k)``: the experts of each token, and their weights.
        """
        total = torch.zeros_like(x)
        for number, expert in enumerate(self):
            tokens, place = (top_k_index == number).nonzero(as_tuple=True)
            if len(tokens):
                part = expert(x[tokens]) * top_k_weights[tokens, place, None]
                total.index_add_(0, tokens, part.to(total.dtype))
        return total


def linearize(block: nn.Module, family: Family) -> nn.Module:
    """Replace what is linear-like in a block on the meta device by linears; return the block."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        if family.transposed:
            for path, module in list(block.named_modules()):
                if isinstance(module, Conv1D):
                    width, rows = module.weight.shape
                    _replace(block, path, nn.Linear(width, rows))
        if family.experts is not None and (fused := _fused(block, family.experts.path)) is not None:
            count, width, inner = fused.down_proj.shape
            experts = ExpertList(Expert(width, inner, fused.act_fn) for _ in range(count))
            _replace(block, family.experts.path, experts)
    return block


def _fused(block: nn.Module, path: str) -> Any:
    try:
        return block.get_submodule(path)
    except AttributeError:  # a block without experts
        return None


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(owner), leaf, module)


def _patterns(family: Family) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return what matches a fused parameter and what matches an expert's own weight, by full name."""
    path = re.escape(family.experts.path) if family.experts else "(?!)"
    before = rf"({re.escape(family.blocks)}\.\d+\.{path})"
    return (
        re.compile(rf"{before}\.(gate_up_proj|down_proj)"),
        re.compile(rf"{before}\.(\d+)\.({'|'.join(LEAVES)})\.weight"),
    )


def turned(family: Family, name: str, shape: tuple[int, ...] | torch.Size) -> bool:
    """Whether a tensor is stored ``(in, out)`` by ``transformers`` and in files."""
    inside = name.startswith(f"{family.blocks}.") and name.endswith(".weight")
    return family.transposed and inside and len(shape) == 2


def linear_shapes(family: Family, plain: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes with all linears apart, from those of the plain model."""
    fused, _ = _patterns(family)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in plain.items():
        match = fused.fullmatch(name)
        if match is None:
            found[name] = shape[::-1] if turned(family, name, shape) else shape
            continue
        count, rows, width = shape
        leaves = ("down_proj",) if match[2] == "down_proj" else ("gate_proj", "up_proj")
        for expert in range(count):
            for leaf in leaves:
                found[f"{match[1]}.{expert}.{leaf}.weight"] = (rows // len(leaves), width)
    return found


def from_plain(family: Family, name: str, state: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor of that name, a view, out of the state dict of a plain model."""
    match = _patterns(family)[1].fullmatch(name)
    if match is None:
        tensor = state[name]
        return tensor.T if turned(family, name, tensor.shape) else tensor
    if match[3] == "down_proj":
        return state[f"{match[1]}.down_proj"][int(match[2])]
    gate, up = state[f"{match[1]}.gate_up_proj"][int(match[2])].chunk(2)
    return gate if match[3] == "gate_proj" else up


def to_plain(family: Family, names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a plain model.

    Parameters
    ----------
    names
        Names of all tensors, linears apart.
    read
        Returns the tensor of such a name.
    """
    own = _patterns(family)[1]
    state: dict[str, Tensor] = {}
    experts: dict[str, int] = {}
    for name in names:
        match = own.fullmatch(name)
        if match is None:
            tensor = read(name)
            state[name] = tensor.T.contiguous() if turned(family, name, tensor.shape) else tensor
        else:
            experts[match[1]] = max(experts.get(match[1], 0), int(match[2]) + 1)
    for path, count in experts.items():
        each = [f"{path}.{e}" for e in range(count)]
        state[f"{path}.down_proj"] = torch.stack([read(f"{e}.down_proj.weight") for e in each])
        state[f"{path}.gate_up_proj"] = torch.stack(
            [torch.cat([read(f"{e}.gate_proj.weight"), read(f"{e}.up_proj.weight")]) for e in each]
        )
    return state


def name_here(family: Family, name: str) -> str:
    """Return what a tensor of a file is called here."""
    for there, here in family.renames:
        name = name.replace(there, here)
    return name


def name_in_files(family: Family, name: str) -> str:
    """Return what a tensor is called in files, as the model's publisher named it."""
    for there, here in family.renames:
        name = name.replace(here, there)
    return name


def to_files(family: Family, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as files hold them: renamed, and values turned where ``transformers`` wants ``(in, out)``."""
    return {
        name_in_files(family, name): tensor.T
        if tensor.is_floating_point() and turned(family, name, tensor.shape)
        else tensor
        for name, tensor in state.items()
    }
