"""What the walk hands on of a block that it has worked on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from frugallm.formats.quantized_tensor import QuantizedTensor
from frugallm.walk.block import Block


@dataclass
class SolvedBlock:
    """What came out of one block: stored linears by path, tensors of their rounded inputs, and facts for the report.

    ``reference`` is the block before anything was rounded, while a step still compares with it.
    """

    block: Block
    reference: Block | None = None
    linears: dict[str, QuantizedTensor] = field(default_factory=dict)
    inputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
