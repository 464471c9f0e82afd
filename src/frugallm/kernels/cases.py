"""The kernels' cases: what the equivalence test compares and the bench times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from frugallm.kernels.packing import KINDS, Kind, PackedLinear, pack, pack_float

#: Rows of activations that the bench times: a token, eight streams, a prompt.
TIMED_ROWS = (1, 8, 512)


@dataclass(frozen=True)
class LinearCase:
    """A product.

    Attributes
    ----------
    kind
        What the weight's lines hold.
    rows, width
        Shape of the weight.
    group
        Inputs that share a scale.
    zeros
        What the grid has beside scales.
    scales
        Type of scales, and of minima.
    timed
        Whether it is of a size that is worth timing.
    """

    kind: Kind
    rows: int
    width: int
    group: int = 64
    zeros: Literal["none", "points", "minima"] = "none"
    scales: torch.dtype = torch.bfloat16
    timed: bool = False

    @property
    def name(self) -> str:
        """What it is called in messages and tables."""
        grid = f" g{self.group} {self.zeros} {str(self.scales).removeprefix('torch.')}"
        return f"{self.kind} {self.rows}x{self.width}{grid if self.kind.startswith('int') else ''}"

    def weight(self) -> PackedLinear:
        """Return a weight of random numbers, with a bias."""
        g = torch.Generator().manual_seed(self.rows * 7 + self.width)
        bias = torch.randn(self.rows, generator=g)
        if not self.kind.startswith("int"):
            values = torch.randn(self.rows, self.width, generator=g)
            return pack_float(values.bfloat16() if self.kind == "bf16" else values, bias)
        bits = 4 if self.kind == "int4" else 8
        groups = -(-self.width // self.group)
        low = 0 if self.zeros == "minima" else -(2 ** (bits - 1))
        codes = torch.randint(low, low + 2**bits, (self.rows, self.width), generator=g)
        codes = codes.to(torch.uint8 if self.zeros == "minima" else torch.int8)
        scales = (torch.rand(self.rows, groups, generator=g) * 0.1).to(self.scales)
        zeros = None
        if self.zeros == "points":
            zeros = torch.randint(-8, 8, (self.rows, groups), generator=g).to(torch.int8)
        elif self.zeros == "minima":
            zeros = -torch.rand(self.rows, groups, generator=g).to(self.scales)
        return pack(codes, scales, zeros, bits, self.group, bias)

    def inputs(self, rows: int) -> Tensor:
        """Return activations ``(rows, width)``: one row is all zeros, one has an outlier of 3,000."""
        g = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, self.width, generator=g)
        x[0, self.width // 3] = 3000.0
        if rows > 1:
            x[1] = 0
        return x


@dataclass(frozen=True)
class AttentionCase:
    """Queries of one head that stand at the end of a text, over blocks of the cache in any order.

    Attributes
    ----------
    length
        Keys and values.
    queries
        How many, one at each of the last positions.
    head
        Width of the head.
    window
        Positions that a query sees; 0: all.
    """

    length: int
    queries: int
    head: int = 64
    window: int = 0
    timed: bool = False

    @property
    def name(self) -> str:
        """What it is called in messages and tables."""
        window = f" window {self.window}" if self.window else ""
        return f"attention {self.queries} of {self.length}, head {self.head}{window}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys, values, positions of the queries, and the table of blocks."""
        g = torch.Generator().manual_seed(self.length)
        keys, values = torch.randn(2, self.length, self.head, generator=g)
        queries = 2 * torch.randn(self.queries, self.head, generator=g)
        positions = torch.arange(self.length - self.queries, self.length, dtype=torch.int32)
        blocks = -(-self.length // 16)
        return queries, keys, values, positions, torch.randperm(blocks, generator=g).to(torch.int32)


_HALF, _FULL = torch.float16, torch.float32
LINEARS = (
    LinearCase("int4", 40, 128),
    LinearCase("int4", 33, 200, 32, "points"),
    LinearCase("int4", 16, 96, 32, "minima", _HALF),
    LinearCase("int4", 21, 144, 16, "minima", _FULL),
    LinearCase("int4", 1, 40, 40, "none", _HALF),
    LinearCase("int4", 17, 256, 128, "none", _FULL),
    LinearCase("int4", 20, 8256, 32, "points"),  # two tiles do not fit where codes are unpacked
    LinearCase("int8", 40, 128),
    LinearCase("int8", 33, 200, 32, "points", _HALF),
    LinearCase("int8", 20, 64, 32, "minima"),
    LinearCase("int8", 19, 144, 16, "none", _FULL),
    LinearCase("int8", 5, 512, 256, "none", _FULL),
    LinearCase("bf16", 37, 75),
    LinearCase("bf16", 16, 1),
    LinearCase("float32", 37, 75),
    LinearCase("int4", 3072, 576, timed=True),
    LinearCase("int4", 3072, 576, 32, "minima", _HALF, timed=True),
    LinearCase("int4", 576, 1536, timed=True),
    LinearCase("int8", 3072, 576, timed=True),
    LinearCase("int8", 49152, 576, timed=True),
    LinearCase("bf16", 3072, 576, timed=True),
    LinearCase("float32", 3072, 576, timed=True),
)
ATTENTIONS = (
    AttentionCase(1, 1, 16),
    AttentionCase(5, 5, 16),
    AttentionCase(300, 9),
    AttentionCase(530, 20, 20),
    AttentionCase(600, 9, 64, 100),
    AttentionCase(1024, 3, timed=True),
    AttentionCase(512, 512, timed=True),
)
assert {case.kind for case in LINEARS} == set(KINDS)
