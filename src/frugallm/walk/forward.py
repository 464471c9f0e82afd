"""How hidden states come to a block and go through it piece by piece, whatever the model's family.

Blocks run by their own ``transformers`` code. To stop in front of a site, a hook takes the site's input and breaks the
forward off; to go on from there, the sublayer is replaced by a stand-in that returns a value computed elsewhere. So
residual connections, norms behind sublayers and parallel sublayers need no description of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frugallm.models.family import Family, Site, Sublayer
from frugallm.walk.block import Block
from frugallm.walk.hidden import HiddenStates

ROWS_PER_CHUNK = 8192


@dataclass(frozen=True)
class Call:
    """What the model hands to one of its blocks beside the hidden states: rotary values, mask, positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run ``block`` on ``x (windows, length, width)``."""
        out = block(x, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


class _Recorder(nn.Module):
    """Stands where a block was: notes what it is given, and returns the hidden states as they came."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: it has no weights

    def __getattr__(self, name: str) -> Any:
        return getattr(
            self.__dict__["block"], name
        )  # what the model asks of its blocks, such as the kind of attention

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__["hidden"], self.__dict__["call"] = x, Call(args, kwargs)
        return x


class Entrance:
    """The model around its blocks: from embeddings to what the first block is given.

    Parameters
    ----------
    skeleton
        The model, its parameters on the meta device; it is taken apart.
    family
        Its description.
    tensor
        Returns a tensor outside the blocks (positions, final norm), float32, by its full name.
    """

    def __init__(self, skeleton: Any, family: Family, tensor: Callable[[str], Tensor]) -> None:
        path, _, leaf = family.blocks.rpartition(".")
        self.recorders = [_Recorder(block) for block in skeleton.get_submodule(family.blocks)]
        setattr(skeleton.get_submodule(path), leaf, nn.ModuleList(self.recorders))
        self.base = skeleton.get_submodule(family.base).eval()
        self.embedding = skeleton.get_submodule(family.embedding)
        self.embedding.padding_idx = None  # it may lie beyond the rows of one batch
        rest = [n for n, p in skeleton.named_parameters() if p.is_meta]
        for name in rest:
            if (
                name.startswith((f"{family.base}.", f"{family.blocks}."))
                and name != f"{family.embedding}.weight"
            ):
                owner, _, leaf = name.rpartition(".")
                value = nn.Parameter(tensor(name), requires_grad=False)
                setattr(skeleton.get_submodule(owner), leaf, value)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return what the first block is given for tokens whose rows of the table are ``rows (windows, length, width)``."""
        windows, length, width = rows.shape
        self.embedding.weight = nn.Parameter(rows.reshape(-1, width).clone(), requires_grad=False)
        with torch.no_grad():
            self.base(input_ids=torch.arange(windows * length).view(windows, length), use_cache=False)
        return self.recorders[0].__dict__["hidden"]

    def fill(self, hidden: HiddenStates, windows: Tensor, rows: Callable[[int, int], Tensor]) -> None:
        """Write what the first block is given for ``windows (windows, length)`` of token ids into ``hidden``.

        ``rows(start, stop)`` returns some rows of the table; it is called chunk by chunk.
        """
        flat, ids = hidden.values.view(-1, hidden.shape[-1]), windows.reshape(-1)
        vocabulary = self.embedding.num_embeddings
        for start in range(0, vocabulary, ROWS_PER_CHUNK):
            stop = min(start + ROWS_PER_CHUNK, vocabulary)
            places = ((ids >= start) & (ids < stop)).nonzero()[:, 0]
            if len(places):
                flat[places] = rows(start, stop).float()[ids[places] - start]
        for batch in hidden.batches():
            hidden[batch] = self(hidden[batch])

    def calls(self) -> list[Call]:
        """Return what each block was given beside the hidden states, the last time."""
        return [recorder.__dict__["call"] for recorder in self.recorders]


class _Stop(Exception):
    """No error: the forward has come as far as it should."""


class _StandIn(nn.Module):
    """Returns a value computed elsewhere, or zero, in the place of a sublayer's last module."""

    def __init__(self, value: Tensor | None, pair: bool) -> None:
        super().__init__()
        self.value, self.pair = value, pair

    def forward(self, *args: Any, **_: Any) -> Any:
        if self.value is None:
            value = torch.zeros(1)
        else:
            # Some blocks (OPT) take their windows apart on the way.
            value = self.value.float().view(*args[0].shape[:-1], -1) if args else self.value.float()
        return (value, None) if self.pair else value


@contextmanager
def replaced(block: Block, values: Iterable[tuple[Sublayer, Tensor | None]]) -> Iterator[None]:
    """Let sublayers return these values (``None``: nothing) instead of computing; their norms do nothing either."""
    before: list[tuple[nn.Module, str, nn.Module]] = []
    for sub, value in values:
        norm = (sub.reads.writer,) if sub.reads.writer_kind == "norm" and sub.reads.writer else ()
        for path in (*norm, *sub.modules):
            stand_in = _StandIn(value, sub.attention) if path == sub.modules[-1] else nn.Identity()
            owner_path, _, leaf = path.rpartition(".")
            owner = block.module.get_submodule(owner_path)
            before.append((owner, leaf, getattr(owner, leaf)))
            setattr(owner, leaf, stand_in)
    try:
        yield
    finally:
        for owner, leaf, module in before:
            setattr(owner, leaf, module)


def reader(block: Block, site: Site) -> nn.Module:
    """Return the module whose first input is the site's."""
    return block.module.get_submodule(site.input_of or site.name)


def input_of(block: Block, site: Site, call: Call, x: Tensor, sub: Sublayer | None = None) -> Tensor:
    """Return the input of ``site`` for block inputs ``x``; what lies behind it is not computed.

    With ``sub``, the site's sublayer, the others add nothing: ``x`` are hidden states in front of it already.
    """
    seen: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])
        raise _Stop

    # In front, so that the input is seen as it comes, before it is rounded.
    hook = reader(block, site).register_forward_pre_hook(stop, prepend=True)
    try:
        with replaced(block, [(other, None) for other in block.graph if sub not in (None, other)]):
            call(block.module, x)
    except _Stop:
        return seen[0].reshape(*x.shape[:2], -1)  # some blocks (OPT, experts) take their windows apart
    finally:
        hook.remove()
    raise AssertionError(f"the block never came to {site.name}")


@contextmanager
def watched(block: Block, sites: Iterable[Site], see: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Call ``see(site, input)`` whenever the block, run as a whole, comes to one of ``sites``."""
    hooks = [
        reader(block, site).register_forward_pre_hook(
            lambda _, inputs, site=site: see(site, inputs[0]), prepend=True
        )
        for site in sites
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
