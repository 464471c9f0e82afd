"""What is done to the linears of one site, once the statistics of their input are complete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frugallm.compress.plan import Plan, Work
from frugallm.compress.prepare import rotation_of
from frugallm.compress.quantize.hadamard import Rotation
from frugallm.errors import DataError
from frugallm.formats.extras import InputRotation
from frugallm.formats.quantized_tensor import QuantizedTensor
from frugallm.formats.rounded_inputs import round_inputs
from frugallm.models.family import Site
from frugallm.walk.block import Block
from frugallm.walk.facts import linear_facts
from frugallm.walk.solved import SolvedBlock
from frugallm.walk.statistics import Gather, Statistics

ENTRIES_SOLVED_AT_ONCE = 2**26
#: Not a statistic of inputs, but of what reads them; only ``input_parameters`` may ask for it.
WEIGHT_MOMENT = "weight_moment"


def _at_once(paths: list[str], block: Block) -> Iterator[list[str]]:
    """Cut a site's linears into lots of bounded size: a block may have hundreds of experts."""
    lot: list[str] = []
    entries = 0
    for path in paths:
        size = block.weight(path).numel()
        if lot and entries + size > ENTRIES_SOLVED_AT_ONCE:
            yield lot
            lot, entries = [], 0
        lot.append(path)
        entries += size
    yield lot


@dataclass(frozen=True)
class SiteSolver:
    """Solves the linears of sites by a plan, and says what it must know of their inputs.

    Attributes
    ----------
    plan
        What to do.
    fast, stored
        Type of products, and type in which uncompressed tensors are stored.
    """

    plan: Plan
    fast: torch.dtype
    stored: torch.dtype

    def gather(self, block: Block, site: Site, solving: bool) -> Gather:
        """Return what gathers the statistics that the steps read, if the site is to be solved."""
        needs: set[str] = set()
        for path in site.linears:
            work = self.plan.work(block.full_name(path))
            if work is not None and solving:
                needs |= work.needs | work.input_needs
        width = block.weight(site.name).shape[1]
        return Gather(needs - {WEIGHT_MOMENT}, width, self._rotation(block, site))

    def _rotation(self, block: Block, site: Site) -> Rotation | None:
        return rotation_of(self.plan.linears, map(block.full_name, site.linears))

    def solve(self, done: SolvedBlock, site: Site, statistics: Statistics) -> None:
        """Solve the linears of ``site``; where statistics are used, those with one plan are solved as one weight.

        Where rows are independent of each other that changes nothing but the time: one factor serves them all. Scales
        of a tensor are shared then, as engines that join such linears want it.
        """
        block, rotation = done.block, self._rotation(done.block, site)
        together: dict[tuple[Any, ...], list[str]] = {}
        works: dict[str, Work] = {}
        inputs: dict[tuple[Any, ...], dict[str, Tensor] | None] = {}  # one input, so one answer of each step
        for path in site.linears:
            work = self.plan.work(block.full_name(path))
            if work is not None:
                works[path] = work
                plan = work.rounded
                key = () if plan is None else (id(plan.rounder), plan.scheme.activations)
                if key not in inputs:
                    seen = dict(statistics)
                    if WEIGHT_MOMENT in work.input_needs:
                        moment = block.weight_moment(site)
                        seen[WEIGHT_MOMENT] = (
                            moment if rotation is None else rotation.apply(rotation.apply(moment).T)
                        )
                    inputs[key] = self._input_parameters(block.full_name(path), work, seen)
                if (parameters := inputs[key]) is not None:
                    done.inputs[path] = {leaf: tensor.clone() for leaf, tensor in parameters.items()}
                one_unit = plan is not None and plan.scheme.weights.two_scales
                shared = (work.needs or one_unit) and all(step.by_rows for step in work.steps)
                together.setdefault((work.key, "" if shared else path), []).append(path)
        for paths in together.values():
            for some in _at_once(paths, block):
                self._solve_together(done, some, works[some[0]], statistics, rotation)

    def _solve_together(
        self,
        done: SolvedBlock,
        paths: list[str],
        work: Work,
        statistics: Statistics,
        rotation: Rotation | None,
    ) -> None:
        weights = [done.block.weight(p) for p in paths]
        if rotation is not None:
            weights = [rotation.apply(w) for w in weights]  # in the basis of the statistics
        statistics = {**statistics, **done.inputs.get(paths[0], {})}
        form = work.form(weights[0] if len(weights) == 1 else torch.cat(weights), statistics)
        start = 0
        for path, weight in zip(paths, weights):
            stop = start + weight.shape[0]
            part = form[start:stop].clone() if isinstance(form, Tensor) else form.rows(start, stop)
            own = self.plan.work(done.block.full_name(path))
            assert own is not None
            part = own.repaired(weight, part, statistics)
            self._store(done, path, weight, part, own, statistics)
            start = stop

    def _input_parameters(self, name: str, work: Work, statistics: Statistics) -> dict[str, Tensor] | None:
        """Return what is stored about the rounded inputs of a linear; ``None``: they are not rounded."""
        plan = work.rounded
        if plan is None or plan.rounder is None or plan.scheme.activations is None:
            return None
        seen = [statistics[name] for name in ("absmax", "extremes") if name in work.input_needs]
        if not all(bool(values.any()) for values in seen):
            raise DataError(
                f"no calibration token reached {name}, so its input has no range",
                "Take more text (samples), or round that input per token",
            )
        return plan.rounder.input_parameters(plan.scheme.activations, statistics)

    def _store(
        self,
        done: SolvedBlock,
        path: str,
        original: Tensor,
        form: QuantizedTensor | Tensor,
        work: Work,
        statistics: Statistics,
    ) -> None:
        """Keep what was made of ``original`` ``(out, in)``, both in the basis of the linear's inputs, and facts about it."""
        value = form.to(self.stored).float() if isinstance(form, Tensor) else form.dequantize()
        facts = linear_facts(original, value, form, work, statistics, self.fast)
        done.layers.append({"name": done.block.full_name(path), **facts})
        if isinstance(form, QuantizedTensor):
            if work.rounded is not None and work.rounded.rotation is not None:
                form = form.plus(InputRotation.of(work.rounded.rotation))
                value = form.dequantize()
            done.linears[path] = form
        done.block.set_weight(path, value)

    def round_inputs(self, done: SolvedBlock, site: Site) -> None:
        """From here on, round the inputs of the site's linears as the stored scheme will at run time."""
        for path in site.linears:
            plan = self.plan.linears.get(done.block.full_name(path))
            if plan is None or plan.scheme.activations is None:
                continue
            linear = done.block.module.get_submodule(path)
            round_inputs(linear, plan.scheme.activations, done.inputs.get(path, {}))
