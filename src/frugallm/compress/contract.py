"""The contract of post-training compression: what a method of this family writes, and what the walk does for it.

A :class:`BlockMethod` works on decoder blocks. It may have these verbs and writes the one that its paper is about:

``rewrite(block, statistics)``
    Change the block without changing its function. Statistics are those of the block as it is before.
``prune(weight, statistics)``
    Set entries of one weight ``(out, in)`` to zero. The result is stored dense, or rounded by a later step.
``solve(weight, scheme, statistics)``
    Choose the stored values of one weight ``(out, in)`` on a grid.
``repair(weight, stored, statistics)``
    Store something beside the codes of a weight that this step or an earlier one has rounded.
``reconstruct(task)``
    Train the codes of a whole block, with gradients, so that its outputs come close to those of the original block.

``schemes(checkpoint, planned, statistics)`` is for steps that choose for every linear *how* it will be stored, before
anything is changed: other group sizes, other bits. Whoever rounds the linear does so on the grid that was chosen.

The walk prunes, solves and repairs site by site in the order of computation, with statistics of inputs that have passed through
everything stored so far. Where rows are independent of each other (``by_rows``), linears that share an input are one
weight. Where an earlier step has pruned the weight, ``solve`` finds ``pruned``, bool ``(out, in)``, among its statistics:
these entries are zero and stay zero. A solver that moves weights away from their nearest value must read it, and so must
one whose grids need not hold zero (float zero points); for the others there is nothing to do.

A :class:`PrepareMethod` rewrites the whole model before the walk, as a checkpoint around the one given. A
:class:`TableMethod` works on the embedding and the head, by rows. The walk owns everything else: loading, forwards,
statistics, writing, progress, resume.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from frugallm.compress.prune.unstructured.masks import Pattern, Sparsity, pattern_share
from frugallm.errors import ParameterError
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor, WeightScheme
from frugallm.formats.rounded_inputs import static_scale
from frugallm.method import Method

if TYPE_CHECKING:
    from frugallm.models.checkpoint import Checkpoint
    from frugallm.walk.block import Block
    from frugallm.walk.reconstruction import Reconstructed, Reconstruction

GROUP_SIZES = (128, 64, 32, 16)
MIN_GROUP = 16


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of the shell-style ``patterns`` matches the whole of ``name``."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class BlockMethod(Method):
    """A method that works on one decoder block at a time."""

    rewrite_needs: ClassVar[frozenset[str]] = frozenset()
    #: Kinds of extras that ``repair`` adds, in order.
    adds: ClassVar[tuple[str, ...]] = ()
    solve_needs: ClassVar[frozenset[str]] = frozenset()
    #: Statistics that ``schemes`` reads: of the model as it is, one number a channel (for all linears are kept at once),
    #: or ``gain``.
    scheme_needs: ClassVar[frozenset[str]] = frozenset()
    #: "step": the recipe's answer for its linears; "default": used where no later step solves them; "no": never.
    solves: ClassVar[Literal["step", "default", "no"]] = "no"
    #: Rows of a weight do not see each other, so linears that share an input may be worked on as one weight.
    by_rows: ClassVar[bool] = True
    #: What rounds leaves the zeros of an earlier step where they are.
    keeps_zeros: ClassVar[bool] = True

    skip: tuple[str, ...] = Field((), description="name patterns of linears to leave as they are")
    only: tuple[str, ...] = Field((), description="name patterns of the linears to work on; empty: all")

    def touches(self, name: str) -> bool:
        """Whether this step works on the linear of that full name."""
        return (not self.only or matches(name, self.only)) and not matches(name, self.skip)

    @property
    def rewrites(self) -> bool:
        """Whether this method has a ``rewrite`` verb."""
        return type(self).rewrite is not BlockMethod.rewrite

    @property
    def prunes(self) -> bool:
        """Whether this method has a ``prune`` verb."""
        return type(self).prune is not BlockMethod.prune

    @property
    def repairs(self) -> bool:
        """Whether this method has a ``repair`` verb."""
        return type(self).repair is not BlockMethod.repair

    @property
    def repair_needs(self) -> frozenset[str]:
        """Names of the statistics that ``repair`` reads with the parameters that the step has."""
        return frozenset()

    @property
    def reconstructs(self) -> bool:
        """Whether this step, with the parameters that it has, trains blocks after they are solved."""
        return type(self).reconstruct is not BlockMethod.reconstruct

    @property
    def reads_original(self) -> bool:
        """Whether ``reconstruct`` reads the hidden states of the original model, with the parameters that the step has."""
        return False

    @property
    def rounds(self) -> bool:
        """Whether this step, with the parameters that it has, puts weights on a grid."""
        return self.solves != "no"

    @property
    def chooses(self) -> bool:
        """Whether this method has a ``schemes`` verb."""
        return type(self).schemes is not BlockMethod.schemes

    @property
    def flexible(self) -> bool:
        """Whether this step rounds on the grid that it is given, and not on one that its method fixes."""
        return self.chooses or "bits" in type(self).model_fields

    def zeros(self, widths: Mapping[str, int]) -> Sparsity | None:
        """Return how many weights of linears with these input widths will be zero, if the step prunes."""
        return None

    def weights(self, widths: Mapping[str, int]) -> WeightScheme | None:
        """Return how the weights of linears with these input widths are to be stored."""
        return None

    def schemes(
        self,
        checkpoint: Checkpoint,
        planned: Mapping[str, WeightScheme],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, WeightScheme]:
        """Return how each linear of ``planned`` is to be stored, chosen from the weights themselves.

        Parameters
        ----------
        checkpoint
            The model before any step has worked on it. Weights are read from it one at a time, so that a model larger
            than memory can be looked at.
        planned
            Full name of each linear that this step touches to what the step that rounds it has planned.
        statistics
            Full name to the statistics named in ``scheme_needs``.

        Returns
        -------
        dict
            A scheme for every name. Linears that share an input (:func:`together`) get the same one, for engines fuse
            them. The same weights and statistics give the same choice.
        """
        return dict(planned)

    def activations(self, name: str) -> ActivationScheme | None:
        """Return how the input of the linear of that name is to be rounded at run time, if at all."""
        return None

    def input_needs(self, scheme: ActivationScheme) -> frozenset[str]:
        """Return the names of the statistics that :meth:`input_parameters` reads."""
        return frozenset() if scheme.dynamic else frozenset({"absmax"})

    def input_parameters(
        self, scheme: ActivationScheme, statistics: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what is stored about inputs that are rounded as :meth:`activations` says, by leaf.

        ``solve`` of the same linear finds these tensors among its statistics.
        """
        return {} if scheme.dynamic else {"input_scale": static_scale(statistics["absmax"], scheme)}

    def notes(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        """Return what a run should say beforehand about the step's work on linears of these shapes ``(out, in)``."""
        return ()

    def rewrite(self, block: Block, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Change ``block`` without changing its function; ``statistics`` by site name."""
        raise NotImplementedError

    def prune(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return ``weight`` ``(out, in)`` float32 with zeros in it, as a tensor of its own."""
        raise NotImplementedError

    def solve(
        self, weight: Tensor, scheme: WeightScheme, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Return the stored form of ``weight`` ``(out, in)`` float32."""
        raise NotImplementedError

    def repair(
        self, weight: Tensor, stored: QuantizedTensor, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        """Return ``stored`` with extras of the kinds in ``adds``, closer to ``weight`` ``(out, in)`` float32."""
        raise NotImplementedError

    def reconstruct(self, task: Reconstruction) -> Reconstructed:
        """Train what a solved block is stored as; schemes, shapes and everything else about it stay."""
        raise NotImplementedError


class PruneMethod(BlockMethod):
    """A method that sets a given share of every weight to zero; it writes ``prune``."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of every linear's weights that become zero")
    pattern: Pattern = Field(
        "unstructured", description="where zeros may lie: anywhere, or n of every m consecutive inputs (n:m)"
    )

    @property
    def target(self) -> Sparsity:
        """Share and pattern of the zeros."""
        return Sparsity(share=self.sparsity, pattern=self.pattern)

    def zeros(self, widths: Mapping[str, int]) -> Sparsity:
        """Return share and pattern of the zeros in linears of these input widths.

        Raises
        ------
        ParameterError
            If the pattern fixes another share, or does not fit a width.
        """
        fixed, group = pattern_share(self.pattern), self.target.group
        if fixed is not None and self.target.share != fixed:
            raise ParameterError(
                f"{self.name()}: pattern {self.pattern} makes {fixed:g} of the weights zero, not sparsity {self.sparsity:g}",
                "Leave sparsity out, or use pattern=unstructured",
            )
        for name, width in widths.items():
            if group and width % group:
                raise ParameterError(
                    f"{self.name()}: pattern {self.pattern} does not fit the {width} inputs of {name}",
                    "Use pattern=unstructured, or skip that linear",
                )
        return self.target


class PrepareMethod(Method):
    """A method that rewrites the whole model without changing its function, before anything else is done."""

    def prepare(self, checkpoint: Checkpoint, seed: int) -> Checkpoint:
        """Return a checkpoint that reads ``checkpoint`` and computes the rewritten tensors as they are read.

        Raises
        ------
        ModelError
            If the model cannot be rewritten so; one line says why.
        """
        raise NotImplementedError

    def rotations(self, checkpoint: Checkpoint, rounded: Collection[str]) -> dict[str, int]:
        """Return the linears whose inputs are to be rotated at run time: full name to order of the Hadamard matrix.

        ``rounded`` are the full names of the linears whose inputs are rounded.
        """
        return {}


class TableMethod(Method):
    """A method that works on the embedding and the head, ``(vocabulary, width)``, by rows."""

    def weights(self, widths: Mapping[str, int]) -> WeightScheme:
        """Return how tables of these widths are to be stored."""
        raise NotImplementedError

    def solve(self, rows: Tensor, scheme: WeightScheme) -> QuantizedTensor:
        """Return the stored form of some rows ``(rows, width)`` float32."""
        raise NotImplementedError


def together(checkpoint: Checkpoint, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the linears among ``names`` (full names), those that share an input together, in order of computation."""
    family, config, wanted = checkpoint.family, checkpoint.config, set(names)
    sites = [
        tuple(name for path in site.linears if (name := f"{family.block(index)}.{path}") in wanted)
        for index in range(config.num_hidden_layers)
        for site in family.sites(config, index)
    ]
    return [site for site in sites if site]


def fitting_group_sizes(widths: Mapping[str, int]) -> list[int]:
    """Return the multiples of 8 from 16 up that divide every width."""
    common = math.gcd(*widths.values())
    return [g for g in range(MIN_GROUP, common + 1, 8) if common % g == 0]


def resolve_group_size(method: str, group_size: int | None, widths: Mapping[str, int]) -> int | None:
    """Return the group size to use for linears of these input widths (name to width).

    ``None`` means the default: 128 where every width allows it, otherwise the largest of 64, 32, 16 that divides them
    all; ``-1`` means one scale a row.

    Returns
    -------
    int or None
        Columns per scale, ``None`` for the whole row.

    Raises
    ------
    ParameterError
        If an explicit size does not divide a width, or no default does.
    """
    if group_size == -1:
        return None
    fitting = fitting_group_sizes(widths)
    if group_size is None:
        for size in GROUP_SIZES:
            if all(w % size == 0 for w in widths.values()):
                return size
        name, width = min(widths.items(), key=lambda item: math.gcd(item[1], GROUP_SIZES[0]))
        raise ParameterError(
            f"{method}: no group size from 16 up divides every width ({name} has {width} inputs)",
            "Use group_size=-1 (one scale a row), or skip that linear",
        )
    if group_size not in fitting:
        sizes = ", ".join(map(str, fitting)) or "none"
        hint = f"Sizes that fit: {sizes}; -1 is one scale a row"
        for name, width in widths.items():
            if group_size == 0 or width % group_size:
                raise ParameterError(
                    f"{method}: group_size {group_size} does not divide the {width} inputs of {name}", hint
                )
        raise ParameterError(f"{method}: group_size {group_size} is no multiple of 8 from 16 up", hint)
    return group_size
