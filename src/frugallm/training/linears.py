"""The parts of a model that training methods rewrite, found by the site graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from frugallm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from frugallm.models.family import Family


def block_linears(student: PreTrainedModel, family: Family) -> dict[str, nn.Linear]:
    """Return the linears of all blocks by full name, in the order of computation.

    Raises
    ------
    ModelError
        If they are not modules of their own: GPT-2's ``Conv1D``, fused experts.
    """
    found: dict[str, nn.Linear] = {}
    for index in range(student.config.num_hidden_layers):
        for path in family.linears(student.config, index):
            name = f"{family.block(index)}.{path}"
            try:
                module = student.get_submodule(name)
            except AttributeError:
                module = None
            if not isinstance(module, nn.Linear):
                raise ModelError(
                    f"{student.config.model_type}: {name} is no linear of its own in transformers",
                    "Rounding while training reaches plain linears only; take a model like Llama",
                )
            found[name] = module
    return found


def norms_before(student: PreTrainedModel, family: Family) -> dict[str, nn.Module]:
    """Return the norms of all blocks whose output linears read, by full name."""
    found: dict[str, nn.Module] = {}
    for index in range(student.config.num_hidden_layers):
        for site in family.sites(student.config, index):
            if site.writer_kind == "norm" and site.writer is not None:
                name = f"{family.block(index)}.{site.writer}"
                found[name] = student.get_submodule(name)
    return found
