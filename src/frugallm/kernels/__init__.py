"""Operations that decide the speed on a processor: a reference in torch, and native code for what the processor has.

How sums are ordered, what the layouts are and what was measured is in ``docs/kernels.md``.
"""

from frugallm.kernels.library import path_name
from frugallm.kernels.packing import PackedLinear, pack, pack_weight

__all__ = ["PackedLinear", "pack", "pack_weight", "path_name"]
