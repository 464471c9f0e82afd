"""How a trained model lies in its folder: what is stored in the place of each tensor, and what ``config.json`` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frugallm.formats.quantized_tensor import ActivationScheme, LinearScheme, QuantizedTensor

if TYPE_CHECKING:
    from frugallm.compress.plan import Plan
    from frugallm.formats.folder import Encode
    from frugallm.models.family import Family


@dataclass(frozen=True)
class Layout:
    """A stored form of a trained model.

    Attributes
    ----------
    label
        What the linears are stored as, for people.
    stored
        The codes of every linear and table that has some, by full name.
    encode
        Returns what is stored in the place of a tensor, by its full name and value.
    quantization
        ``quantization_config`` of ``config.json``.
    stem
        Of the files of weights.
    in_transformers
        Whether plain ``transformers`` loads the folder.
    rounds_inputs
        Whether inputs of linears are rounded at run time.
    dropped
        Ends of names of tensors that serve training alone and are not stored.
    notes
        What a reader of the result should know about it.
    plan
        What ``frugal run`` would plan for the same folder, if it is in the format of its results.
    """

    label: str
    stored: Mapping[str, QuantizedTensor]
    encode: Encode
    quantization: Mapping[str, Any] | None
    stem: str = "model"
    in_transformers: bool = True
    rounds_inputs: bool = False
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    plan: Plan | None = None


def dense(dtype: torch.dtype) -> Layout:
    """Return the layout of a model whose weights are stored as they are, in ``dtype``."""
    from frugallm.compress.plan import Plan

    return Layout(
        label=str(dtype).removeprefix("torch."),
        stored={},
        encode=lambda name, value: {name: value.to(dtype)},
        quantization=None,
        plan=Plan(rewrites=(), linears={}, tables={}, left_alone=()),
    )


def compressed(
    linears: Mapping[str, QuantizedTensor],
    tables: Mapping[str, QuantizedTensor],
    activations: ActivationScheme | None,
    family: Family,
    dtype: torch.dtype,
    *,
    tied: bool,
    dropped: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Layout:
    """Return the layout of linears and tables on grids, in the containers that ``frugal run`` writes.

    Parameters
    ----------
    linears, tables
        What was trained, by full name; all other tensors are stored dense, in ``dtype``.
    activations
        How inputs of the linears are rounded at run time.
    tied
        Whether the head is the embedding.
    """
    from frugallm.compress.contract import BlockMethod, TableMethod
    from frugallm.compress.plan import LinearPlan, Plan, TablePlan
    from frugallm.formats import compressed_tensors
    from frugallm.formats.engines import loads_in_transformers

    schemes = {n: LinearScheme(weights=q.scheme, activations=activations) for n, q in linears.items()}
    plan = Plan(
        rewrites=(),
        linears={n: LinearPlan(scheme, BlockMethod()) for n, scheme in schemes.items()},
        tables={n: TablePlan(q.scheme, TableMethod()) for n, q in tables.items()},
        left_alone=(),
    )

    def encode(name: str, value: Tensor) -> Mapping[str, Tensor]:
        path = name.removesuffix(".weight")
        if path in linears:
            return compressed_tensors.encode_linear(path, linears[path], schemes[path])
        if path in tables:
            q = tables[path]
            found = compressed_tensors.encode_linear(path, q, LinearScheme(weights=q.scheme), table=True)
            if tied and f"{path}.weight" in found:
                # Readers tie the weight of the head to the embedding; its scale has a name of its own.
                found[f"{family.head}.weight_scale"] = q.scale.clone()
            return found
        return {} if name.endswith(dropped) else {name: value.to(dtype)}

    labels = {scheme.label() for scheme in schemes.values()}
    return Layout(
        label=", ".join(sorted(labels)),
        stored={**linears, **tables},
        encode=encode,
        quantization=compressed_tensors.quantization_config(plan, family, tied=tied),
        in_transformers=loads_in_transformers(plan),
        rounds_inputs=activations is not None,
        dropped=dropped,
        notes=notes,
        plan=plan,
    )
