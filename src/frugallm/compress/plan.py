"""What a recipe means for a given model: every linear's scheme and solver, checked before any work begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from frugallm.compress.contract import GROUP_SIZES, BlockMethod, PrepareMethod, TableMethod
from frugallm.compress.order import check_comparing, check_order, check_patterns, check_training
from frugallm.compress.prepare import check_first, rotate_inputs
from frugallm.compress.prune.unstructured.masks import Sparsity
from frugallm.errors import RecipeError
from frugallm.formats.quantized_tensor import ActivationScheme, LinearScheme, QuantizedTensor, WeightScheme
from frugallm.inference.contract import refuse_inference
from frugallm.method import Method
from frugallm.walk.statistics import PAIRED

if TYPE_CHECKING:
    from frugallm.models.checkpoint import Checkpoint
    from frugallm.models.family import Family


Modules = Literal["Linear", "Conv1D", "experts"]
SCALE_DTYPE = WeightScheme(bits=8).scale_dtype

PRUNED_IS_DENSE = (
    "zeros of pruned weights are stored like any other value: "
    "by itself pruning makes the folder neither smaller nor faster"
)


@dataclass(frozen=True)
class LinearPlan:
    """How one linear will be stored, and which steps choose its values.

    Attributes
    ----------
    solver
        Chooses the codes.
    repairs
        Store something beside them, one after the other.
    rounder
        Says what is stored about rounded inputs, if inputs are rounded.
    rotation
        Order of the Hadamard matrix by which inputs are rotated at run time; the weight is rounded in that basis.
    """

    scheme: LinearScheme
    solver: BlockMethod
    repairs: tuple[BlockMethod, ...] = ()
    rounder: BlockMethod | None = None
    rotation: int | None = None


@dataclass(frozen=True)
class PrunePlan:
    """How many weights of one linear will be zero, and which step chooses them.

    That step may be the one that rounds the linear as well: then it does both at once.
    """

    zeros: Sparsity
    pruner: BlockMethod


@dataclass(frozen=True)
class Work:
    """All that is done to one linear's weights: they are pruned, rounded, or pruned and then rounded."""

    pruned: PrunePlan | None
    rounded: LinearPlan | None

    @property
    def steps(self) -> tuple[BlockMethod, ...]:
        """The steps that work on the linear, in order."""
        pruner = () if self.pruned is None else (self.pruned.pruner,)
        solver = () if self.rounded is None else (self.rounded.solver,)
        return pruner if pruner == solver else pruner + solver

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that the steps read."""
        needs = frozenset().union(*(step.solve_needs for step in self.steps))
        return needs.union(*(step.repair_needs for step in self.repairs))

    @property
    def input_needs(self) -> frozenset[str]:
        """Names of the statistics that decide how inputs are rounded."""
        plan = self.rounded
        if plan is None or plan.rounder is None or plan.scheme.activations is None:
            return frozenset()
        return plan.rounder.input_needs(plan.scheme.activations)

    @property
    def repairs(self) -> tuple[BlockMethod, ...]:
        """The steps that store something beside the codes."""
        return () if self.rounded is None else self.rounded.repairs

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for linears on which the same is done."""
        return (*map(id, self.steps), None if self.rounded is None else self.rounded.scheme.weights)

    def label(self) -> str:
        """Return a short name such as ``W4 g64 symmetric, 50 % zeros``."""
        parts = ["dense" if self.rounded is None else self.rounded.scheme.label()]
        return ", ".join(parts + ([] if self.pruned is None else [self.pruned.zeros.label()]))

    def repaired(
        self, weight: Tensor, form: QuantizedTensor | Tensor, statistics: Mapping[str, Tensor]
    ) -> QuantizedTensor | Tensor:
        """Return the form of the one linear ``weight`` ``(out, in)`` with all that is stored beside its codes."""
        for step in self.repairs:
            assert isinstance(form, QuantizedTensor)
            form = step.repair(weight, form, statistics)
        return form

    def form(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> QuantizedTensor | Tensor:
        """Return what will be stored for ``weight`` ``(out, in)`` float32; a tensor is stored dense."""
        if self.rounded is None:
            assert self.pruned is not None
            return self.pruned.pruner.prune(weight, statistics)
        solver, scheme = self.rounded.solver, self.rounded.scheme.weights
        if self.pruned is None or self.pruned.pruner is solver:
            return solver.solve(weight, scheme, statistics)
        weight = self.pruned.pruner.prune(weight, statistics)
        zeros = weight == 0
        return solver.solve(weight, scheme, {**statistics, "pruned": zeros}).with_zeros(zeros)


@dataclass(frozen=True)
class TablePlan:
    """How the embedding or the head will be stored, and by which step."""

    scheme: WeightScheme
    solver: TableMethod


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against a model.

    Attributes
    ----------
    rewrites
        Steps that rewrite blocks before they are solved, in order.
    linears
        Full name of each linear that will be quantized, in the order of computation.
    pruned
        Full name of each linear that will be pruned; it is quantized as well if it stands in ``linears``.
    tables
        Names of the embedding and, where it is a weight of its own, the head.
    left_alone
        Full names of block linears that no step works on.
    notes
        What the run should say about choices it made.
    modules
        What the compressed linears are in ``transformers``: linears, GPT-2's turned ones, or among them fused experts.
    choosers
        Steps that choose, when the work begins, how each linear is stored (:mod:`frugallm.choice`). Until then the
        schemes are those that the rounding steps ask for.
    reconstructions
        Steps that train blocks after they are solved, in order.
    """

    rewrites: tuple[BlockMethod, ...]
    linears: dict[str, LinearPlan]
    tables: dict[str, TablePlan]
    left_alone: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())
    pruned: dict[str, PrunePlan] = field(default_factory=dict)
    modules: Modules = "Linear"
    choosers: tuple[BlockMethod, ...] = ()
    reconstructions: tuple[BlockMethod, ...] = ()

    @property
    def quantizes(self) -> bool:
        """Whether anything is stored in another form than dense."""
        return bool(self.linears or self.tables)

    @property
    def reads_original(self) -> bool:
        """Whether any step reads the hidden states of the original model, so that the walk must carry them."""
        works = [self.work(name) for name in (*self.linears, *self.pruned)]
        compares = any(work.needs & PAIRED.keys() for work in works if work is not None)
        return compares or any(step.reads_original for step in self.reconstructions)

    def reconstructing(self, names: Iterable[str]) -> tuple[BlockMethod, ...]:
        """Return the steps that train any of the linears of these full names, in order."""
        rounded = [name for name in names if name in self.linears]
        return tuple(step for step in self.reconstructions if any(map(step.touches, rounded)))

    def work(self, name: str) -> Work | None:
        """Return what is done to the weights of the linear of that full name, if anything."""
        pruned, rounded = self.pruned.get(name), self.linears.get(name)
        return None if pruned is None and rounded is None else Work(pruned, rounded)

    def schemes(self) -> dict[str, WeightScheme]:
        """Return how the weights of each linear are to be stored, inputs left aside."""
        return {name: _weights_alone(linear.scheme) for name, linear in self.linears.items()}

    def with_schemes(self, chosen: Mapping[str, WeightScheme]) -> Plan:
        """Return the plan with the weights of all linears stored as was chosen."""
        linears = {
            name: replace(linear, scheme=_linear_scheme(chosen[name], linear.scheme.activations, ()))
            for name, linear in self.linears.items()
        }
        return replace(self, linears=linears)


def make_plan(steps: Sequence[Method], checkpoint: Checkpoint) -> Plan:
    """Resolve ``steps`` against the shapes of a model, which is :func:`~frugallm.compress.prepare.prepared` by them already.

    Raises
    ------
    RecipeError
        If the steps make no sense together or in this order.
    ParameterError
        If a parameter does not fit the model.
    """
    if not steps:
        raise RecipeError(
            "a run needs at least one step", "For example: frugal run MODEL gptq:bits=4 --out DIR"
        )
    family = checkpoint.family
    names = checkpoint.linears()
    shapes = {name: checkpoint.shape(f"{name}.weight") for name in names}
    widths = {name: shape[1] for name, shape in shapes.items()}
    blocks = [s for s in steps if isinstance(s, BlockMethod)]
    tables = [s for s in steps if isinstance(s, TableMethod)]
    for step in steps:
        refuse_inference(step)
        if not isinstance(step, PrepareMethod | BlockMethod | TableMethod):
            raise RecipeError(
                f"'{step.name()}' is not a post-training compression step",
                "What acts while a model is trained runs with frugal train",
            )
    prepares = check_first(steps)
    for step in blocks:
        check_patterns(step, names)
    check_order(blocks, names)
    notes: list[str] = []
    linears = _plan_linears(blocks, names, widths, notes)
    pruned = _plan_pruned(blocks, names, widths, notes)
    for step in prepares:
        rotate_inputs(step, checkpoint, linears, pruned)
    plan_tables = _plan_tables(tables, checkpoint, notes)
    for step in blocks:
        notes.extend(step.notes({name: shapes[name] for name in names if step.touches(name)}))
    left = tuple(n for n in names if n not in linears and n not in pruned)
    if blocks and left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        notes.append(f"left in 16 bits: {shown}")
    rewrites = tuple(s for s in blocks if s.rewrites)
    choosers = tuple(s for s in blocks if s.chooses)
    plan = Plan(
        rewrites,
        linears,
        plan_tables,
        left,
        tuple(notes),
        pruned,
        _modules(linears, family),
        choosers,
        tuple(s for s in blocks if s.reconstructs),
    )
    check_training(plan)
    check_comparing(plan, checkpoint)
    return plan


def _modules(linears: Iterable[str], family: Family) -> Modules:
    if family.transposed and linears:
        return "Conv1D"
    experts = family.experts is not None and any(f".{family.experts.path}." in name for name in linears)
    return "experts" if experts else "Linear"


def _plan_linears(
    blocks: list[BlockMethod], names: list[str], widths: dict[str, int], notes: list[str]
) -> dict[str, LinearPlan]:
    solver: dict[str, BlockMethod] = {}
    activations: dict[str, ActivationScheme] = {}
    rounders: dict[str, BlockMethod] = {}
    repairs: dict[str, tuple[BlockMethod, ...]] = {}
    for step in blocks:
        for name in filter(step.touches, names):
            # A "step" replaces a "default", before or after it; check_order saw to the rest. Who chooses grids leaves the
            # rounding to anybody else who can round on them.
            before = solver.get(name)
            free = before is None or before.chooses or (step.chooses and not before.flexible)
            if step.rounds and (step.solves == "step" or free):
                solver[name] = step
            if step.repairs:
                repairs[name] = (*repairs.get(name, ()), step)
            rounded = step.activations(name)
            if rounded is not None:
                activations[name], rounders[name] = rounded, step
    schemes: dict[int, WeightScheme] = {}
    for step in blocks:
        mine = {n: widths[n] for n in names if solver.get(n) is step}
        scheme = step.weights(mine) if mine else None
        if scheme is None:
            continue
        schemes[id(step)] = scheme
        _note_group_size(step, scheme, mine, notes)
    return {
        name: LinearPlan(
            _linear_scheme(schemes[id(s)], activations.get(name), repairs.get(name, ())),
            s,
            repairs.get(name, ()),
            rounders.get(name),
        )
        for name in names
        if (s := solver.get(name)) is not None and id(s) in schemes
    }


def _plan_pruned(
    blocks: list[BlockMethod], names: list[str], widths: dict[str, int], notes: list[str]
) -> dict[str, PrunePlan]:
    found: dict[str, PrunePlan] = {}
    for step in blocks:
        mine = {n: widths[n] for n in names if step.prunes and step.touches(n)}
        zeros = step.zeros(mine) if mine else None
        if zeros is not None:
            found.update((name, PrunePlan(zeros, step)) for name in mine)
    if found:
        notes.append(PRUNED_IS_DENSE)
    return {name: found[name] for name in names if name in found}


def _linear_scheme(
    weights: WeightScheme, activations: ActivationScheme | None, repairs: Iterable[BlockMethod]
) -> LinearScheme:
    """Join both halves; integer engines multiply by the scales of W8A8 in float32, so they are stored so."""
    added = tuple(kind for step in repairs for kind in step.adds)
    if added:
        weights = weights.model_copy(update={"extras": (*weights.extras, *added)})
    if activations is not None and weights.bits == 8:
        weights = weights.model_copy(update={"scale_dtype": "float32"})
    return LinearScheme(weights=weights, activations=activations)


def _weights_alone(scheme: LinearScheme) -> WeightScheme:
    """Return the weights' half of what :func:`_linear_scheme` made, its extras included."""
    if scheme.activations is not None and scheme.weights.bits == 8:
        return scheme.weights.model_copy(update={"scale_dtype": SCALE_DTYPE})
    return scheme.weights


def _note_group_size(step: Method, scheme: WeightScheme, widths: dict[str, int], notes: list[str]) -> None:
    default = getattr(step, "group_size", 0) is None and scheme.group_size not in (None, GROUP_SIZES[0])
    odd = next(((n, w) for n, w in widths.items() if w % GROUP_SIZES[0]), None)
    if default and odd is not None and scheme.grid == "int":
        name, width = odd
        notes.append(
            f"{step.name()}: group_size {scheme.group_size}, as {name} has {width} inputs, no multiple of {GROUP_SIZES[0]}"
        )


def _plan_tables(tables: list[TableMethod], checkpoint: Checkpoint, notes: list[str]) -> dict[str, TablePlan]:
    if len(tables) > 1:
        raise RecipeError(f"{tables[1].name()} stands twice in the recipe", "Keep one")
    if not tables:
        return {}
    family, stored = checkpoint.family, set(checkpoint.names())
    names = [n for n in (family.embedding, family.head) if f"{n}.weight" in stored]
    widths = {n: checkpoint.shape(f"{n}.weight")[1] for n in names}
    scheme = tables[0].weights(widths)
    _note_group_size(tables[0], scheme, widths, notes)
    return {name: TablePlan(scheme, tables[0]) for name in names}
