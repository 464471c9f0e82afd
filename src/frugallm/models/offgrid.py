"""The same function with other weights: weights that no longer lie on the grid of the file they came from.

Quality figures of 4-bit methods mean nothing on a model that was unpacked from 4-bit weights: a method that
finds the old grid again is lossless by construction. Here block norm gains are folded into the linears that
read them, and seeded scales are moved between linears that feed each other: the logits stay, the grid goes.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from frugallm.compress.quantize.transforms import repeat_over_group, scale_columns, scale_rows
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.family import Site, writing_rows
from frugallm.models.rewritten import Rewritten

WIDEST = 2.0  # scales lie in [1 / WIDEST, WIDEST]


class Offgrid(Rewritten):
    """Another checkpoint's function, computed tensor by tensor as it is read (in float32).

    Parameters
    ----------
    base
        Any checkpoint with a described family.
    seed
        Chooses the scales.
    """

    def __init__(self, base: Checkpoint, seed: int = 0) -> None:
        super().__init__(base)
        self.name = f"{base.name}-offgrid"
        self._seed = seed

    def digest(self) -> str:  # noqa: D102
        return hashlib.sha256(f"offgrid seed {self._seed} of {self._base.digest()}".encode()).hexdigest()

    def _read(self, name: str, start: int | None, stop: int | None) -> Tensor:
        match = self._in_block.fullmatch(name)
        if match is None:
            return self._base._read(name, start, stop)
        index, module, kind = int(match[1]), match[2], match[3]
        tensor = self._base.tensor(name).float()
        for site in self.family.sites(self.config, index):
            if module in (*site.linears, *site.others) and kind == "weight" and site.writer is not None:
                tensor = scale_columns(tensor, self._reads(site, index))
            if module == site.writer:
                tensor = self._written(site, index, tensor, kind)
        return tensor[start:stop].clone()

    def _written(self, site: Site, index: int, tensor: Tensor, kind: str) -> Tensor:
        """Return what is left of a norm's gain or bias, or the rows of a linear or its bias divided by the scale."""
        if site.writer_kind != "norm":
            rows = writing_rows(site, tensor.shape[0], self._heads)
            tensor = tensor.clone()
            tensor[rows] = scale_rows(tensor[rows], self._scale(site, index))
            return tensor
        if kind == "bias":
            return scale_rows(tensor, self._reads(site, index))
        return torch.full_like(tensor, 1.0 - self.family.gain_offset)

    def _reads(self, site: Site, index: int) -> Tensor:
        """Return what the columns of a site's linears are multiplied by, ``(in,)``."""
        if site.writer_kind == "norm":
            gain = self._base.tensor(f"{self.family.block(index)}.{site.writer}.weight").float()
            return gain + self.family.gain_offset
        scale = self._scale(site, index)
        if site.writer_kind == "heads":
            return repeat_over_group(scale, self._heads.width, self._heads.repeats)
        return scale

    def _scale(self, site: Site, index: int) -> Tensor:
        """Draw the scale of a writer's rows, log-uniform, equal whenever it is asked for."""
        rows = self.shape(f"{self.family.block(index)}.{site.writer}.weight")[0]
        rows = len(writing_rows(site, rows, self._heads))
        place = hashlib.sha256(f"{self._seed} {index} {site.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(place[:7], "big"))
        return torch.exp((torch.rand(rows, generator=generator) * 2 - 1) * math.log(WIDEST))
