"""One decoder block in memory: its weights as they will be stored, and the transformers module that runs them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from frugallm.compress.quantize import transforms
from frugallm.models.family import Family, Heads, Site, writing_rows
from frugallm.models.linears import linearize


class Block:
    """A decoder block.

    Parameters
    ----------
    skeleton
        The block's transformers module on the meta device; it is copied.
    state
        Tensors by name inside the block (``self_attn.q_proj.weight``).
    family, index
        Which block of what.
    config
        The model's configuration.
    fast
        Type in which products are computed; everything that is not the weight of a linear stays float32.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        state: Mapping[str, Tensor],
        family: Family,
        index: int,
        config: PretrainedConfig,
        fast: torch.dtype,
    ) -> None:
        self.family, self.index, self.fast = family, index, fast
        self.heads = Heads.of(config)
        self.graph = family.graph(config, index)
        self.state = {name: tensor.float() for name, tensor in state.items()}
        self.module = linearize(copy.deepcopy(skeleton), family).eval().requires_grad_(False)
        self.refresh()

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites in the order in which they are computed."""
        return tuple(site for sublayer in self.graph for site in sublayer.sites)

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all linears in the order in which they are computed."""
        return tuple(linear for site in self.sites for linear in site.linears)

    def full_name(self, path: str) -> str:
        """Return the name of a linear or tensor of this block in the whole model."""
        return f"{self.family.block(self.index)}.{path}"

    def weight(self, path: str) -> Tensor:
        """Return the weight ``(out, in)`` float32 of a linear, or the gain of a norm."""
        return self.state[f"{path}.weight"]

    def weight_moment(self, site: Site) -> Tensor:
        """Return ``W^T W (in, in)`` of all weights that read the input of ``site``."""
        moment = torch.zeros(())
        for path in site.linears:
            moment = moment + self.weight(path).T @ self.weight(path)
        return moment

    def set_weight(self, path: str, value: Tensor) -> None:
        """Replace a weight, in the module as well."""
        self.state[f"{path}.weight"] = value
        self._load(f"{path}.weight")

    def refresh(self) -> None:
        """Bring the module in step with all of ``state``."""
        for name in self.state:
            self._load(name)

    def _load(self, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        owner = self.module.get_submodule(path)
        dtype = self.fast if isinstance(owner, nn.Linear) else torch.float32
        setattr(owner, leaf, nn.Parameter(self.state[name].to(dtype), requires_grad=False))

    def round_to(self, dtype: torch.dtype) -> None:
        """Round everything to the type in which what stays uncompressed is stored."""
        for name, tensor in self.state.items():
            self.state[name] = tensor.to(dtype).float()
        self.refresh()

    def legal_scale(self, site: Site, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`scale_site` makes of a scale ``(in,)``.

        Where the writer is a value projection, the scale is made equal over each query group.

        Returns
        -------
        tuple
            The scale of the writer's rows and that of the site's columns ``(in,)``.
        """
        if site.writer_kind != "heads":
            return scale, scale
        written = transforms.tie_over_group(scale, self.heads.width, self.heads.repeats)
        return written, transforms.repeat_over_group(written, self.heads.width, self.heads.repeats)

    def scale_site(self, site: Site, scale: Tensor) -> None:
        """Divide the inputs of ``site`` by ``scale`` ``(in,)`` without changing the block's function.

        The scale is first made legal (:meth:`legal_scale`).

        Raises
        ------
        ValueError
            If nothing writes the site's input that could absorb a scale.
        """
        if site.writer is None:
            raise ValueError(f"nothing can absorb a scale on the input of {site.name}")
        written, scale = self.legal_scale(site, scale)
        offset = self.family.gain_offset if site.writer_kind == "norm" else 0.0
        for leaf in ("weight", "bias"):
            name = f"{site.writer}.{leaf}"
            if name in self.state:
                tensor, plus = self.state[name].clone(), offset if leaf == "weight" else 0.0
                rows = writing_rows(site, tensor.shape[0], self.heads)
                tensor[rows] = transforms.scale_rows(tensor[rows] + plus, written) - plus
                self.state[name] = tensor
        for path in (*site.linears, *site.others):
            self.state[f"{path}.weight"] = transforms.scale_columns(self.weight(path), scale)
        self.refresh()

    def takes_shift(self, site: Site) -> bool:
        """Whether a shift of the inputs of ``site`` has somewhere to go: biases of its writer and of all that read it.

        The writer is a norm, or value projections: attention's weights sum to one, so their shift arrives as it is. What
        an activation function or a product with a gate lies behind takes none.
        """
        readers = (*site.linears, *site.others)
        biases = all(f"{path}.bias" in self.state for path in (site.writer, *readers))
        return site.writer_kind in ("norm", "heads") and biases

    def shift_site(self, site: Site, shift: Tensor) -> None:
        """Take ``shift`` ``(in,)`` away from the inputs of ``site`` without changing the block's function.

        Where the writer is a value projection, the shift is made equal over each query group: the mean is taken.

        Raises
        ------
        ValueError
            If a bias is missing that would have to hold the shift (:meth:`takes_shift`).
        """
        if not self.takes_shift(site):
            raise ValueError(f"no bias can hold a shift of the input of {site.name}")
        written = shift
        if site.writer_kind == "heads":
            written = transforms.tie_shift_over_group(shift, self.heads.width, self.heads.repeats)
            shift = transforms.repeat_over_group(written, self.heads.width, self.heads.repeats)
        bias = self.state[f"{site.writer}.bias"].clone()
        bias[writing_rows(site, len(bias), self.heads)] -= written
        self.state[f"{site.writer}.bias"] = bias
        for path in (*site.linears, *site.others):
            name = f"{path}.bias"
            self.state[name] = transforms.absorb_shift(self.state[name], self.weight(path), shift)
        self.refresh()
