"""The walk: load one block, run the calibration windows through it, let the methods work on it, write it, let it go.

A block's linears are solved in the order in which they are computed. The windows stop in front of each site, the
statistics of its input are complete, its linears are solved, and the windows go on through the stored values. So every
linear sees inputs that have passed through everything stored before it, at the price of one forward per block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frugallm.compress.plan import LinearPlan, Plan
from frugallm.compress.quantize.grids import round_to_nearest
from frugallm.compress.quantize.solvers import proxy_loss
from frugallm.formats.quantized_tensor import ActivationScheme, QuantizedTensor
from frugallm.models.checkpoint import Checkpoint, meta_model
from frugallm.models.family import Site, Sublayer
from frugallm.walk.block import Block
from frugallm.walk.hidden import HIDDEN_LIMIT, HiddenStates
from frugallm.walk.statistics import Gather, Statistics

ROWS_PER_CHUNK = 8192


def round_activations(x: Tensor, scheme: ActivationScheme, scale: Tensor | None) -> Tensor:
    """Round ``x (..., in)`` as engines do at run time: symmetric, one scale a tensor (given) or a token (from ``x``).

    The scale of a token covers its largest magnitude with ``(2^b - 1) / 2`` codes, as in compressed-tensors; beside
    outliers with ``2^(b-1) - 1``, as in bitsandbytes.
    """
    last = 2 ** (scheme.bits - 1) - 1
    if scheme.outliers is not None:
        return _round_beside_outliers(x, scheme.outliers, last)
    if scale is None:
        scale = x.float().abs().amax(-1, keepdim=True) / ((2**scheme.bits - 1) / 2)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((x.float() / scale).round_().clamp_(-last - 1, last) * scale).to(x.dtype)


def _round_beside_outliers(x: Tensor, threshold: float, last: int) -> Tensor:
    """Round ``x (..., in)`` to ``last`` codes either side, one scale a token, except channels with an outlier.

    As bitsandbytes does it: a channel is left as it is in all tokens of the call if any of them reaches ``threshold``
    there; the scale of a token covers all of its values that do not, those in such channels included.
    """
    outlier = x.abs() >= threshold
    left = outlier.flatten(0, -2).any(0)  # (in,)
    scale = x.float().masked_fill(outlier, 0).abs().amax(-1, keepdim=True) / last
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.where(left, x, ((x.float() / scale).round_() * scale).to(x.dtype))


def static_scale(absmax: Tensor, scheme: ActivationScheme) -> Tensor:
    """Return the one scale ``(1,)`` float32 of a static input with channel maxima ``absmax (in,)``."""
    return (absmax.max().clamp(min=1e-8) / ((2**scheme.bits - 1) / 2)).reshape(1)


@dataclass
class SolvedBlock:
    """What came out of one block: stored linears by path, their static input scales, and facts for the report."""

    block: Block
    linears: dict[str, QuantizedTensor] = field(default_factory=dict)
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Walk:
    """The pass over a model's blocks.

    Parameters
    ----------
    checkpoint
        Where weights come from.
    plan
        What to do.
    windows
        ``(windows, length)`` token ids, or ``None`` when nothing in the plan needs text.
    scratch
        Folder for hidden states that do not fit ``hidden_limit`` bytes.
    fast
        Type of products.
    stored
        Type in which uncompressed tensors are stored; activations flow on from values rounded to it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        windows: Tensor | None,
        scratch: Path,
        *,
        fast: torch.dtype = torch.bfloat16,
        stored: torch.dtype = torch.bfloat16,
        hidden_limit: int = HIDDEN_LIMIT,
    ) -> None:
        self.checkpoint, self.plan, self.windows = checkpoint, plan, windows
        self.scratch, self.fast, self.stored, self.hidden_limit = scratch, fast, stored, hidden_limit
        self.family, self.config = checkpoint.family, checkpoint.config
        skeleton = meta_model(checkpoint)
        self.blocks = skeleton.get_submodule(self.family.blocks)
        self.rotary = type(skeleton.get_submodule(self.family.rotary))(self.config)
        self.hidden: HiddenStates | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    # -- the ends of the model -------------------------------------------------------------------------------------

    def embed(self, rows: Callable[[int, int], Tensor]) -> None:
        """Fill the hidden states from the table's rows ``rows(start, stop)`` as they are stored, chunk by chunk."""
        if self.windows is None:
            return
        count, length = self.windows.shape
        width = self.config.hidden_size
        spill = self.scratch / "hidden.bin"
        self.hidden = HiddenStates((count, length, width), torch.float32, spill, self.hidden_limit)
        flat, ids = self.hidden.values.view(-1, width), self.windows.reshape(-1)
        for start in range(0, self.config.vocab_size, ROWS_PER_CHUNK):
            stop = min(start + ROWS_PER_CHUNK, self.config.vocab_size)
            places = ((ids >= start) & (ids < stop)).nonzero()[:, 0]
            if len(places):
                flat[places] = rows(start, stop).float()[ids[places] - start]

    def load(self, index: int, state: dict[str, Tensor] | None = None) -> Block:
        """Return block ``index`` from the checkpoint, or from ``state`` as it was stored."""
        return Block(
            self.blocks[index],
            self.checkpoint.block_state(index) if state is None else state,
            self.family,
            index,
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.fast,
        )

    # -- one block -------------------------------------------------------------------------------------------------

    def solve(self, index: int) -> SolvedBlock:
        """Compress block ``index`` and move the hidden states to its output."""
        started = time.perf_counter()
        done = SolvedBlock(self.load(index))
        for step in self.plan.rewrites:
            statistics = self.observe(done.block, step.rewrite_needs) if self.hidden is not None else {}
            step.rewrite(done.block, statistics)
        done.block.round_to(self.stored)
        done.seconds["rewrite"] = time.perf_counter() - started
        self._advance(done, solving=True)
        done.seconds["total"] = time.perf_counter() - started
        return done

    def replay(
        self, index: int, state: dict[str, Tensor], input_scale: Callable[[str], Tensor | None]
    ) -> None:
        """Move the hidden states through block ``index`` as it was stored; ``input_scale`` by full name."""
        done = SolvedBlock(self.load(index, state))
        for path in self.family.linears:
            plan = self.plan.linears.get(done.block.full_name(path))
            if plan is not None and plan.scheme.activations is not None:
                scale = input_scale(done.block.full_name(path))
                if scale is not None:
                    done.input_scales[path] = scale
        self._advance(done, solving=False)

    def observe(self, block: Block, needs: frozenset[str]) -> dict[str, Statistics]:
        """Return statistics of every site of ``block`` as it is, the hidden states untouched."""
        gathers = {s.name: Gather(needs, block.weight(s.name).shape[1]) for s in self.family.sites}
        hooks = [
            block.module.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, gather=gather: gather.add(inputs[0].to(self.fast))
            )
            for name, gather in gathers.items()
        ]
        assert self.hidden is not None
        with self._running():
            for batch in self.hidden.batches():
                x = self.hidden[batch].clone()
                for sub in self.family.sublayers:
                    h = self._normalized(block, sub, x)
                    x += self._run(block, sub, h)
        for hook in hooks:
            hook.remove()
        return {name: gather.values() for name, gather in gathers.items()}

    def _advance(self, done: SolvedBlock, *, solving: bool) -> None:
        """Stop in front of each site, solve it if asked to, and take the hidden states to the block's output."""
        block = done.block
        if self.hidden is None:
            for site in self.family.sites:
                self._solve_site(done, site, {})
            return
        count, length, _ = self.hidden.values.shape
        for number, sub in enumerate(self.family.sublayers):
            gather = self._gather(block, sub.reads, solving)
            with self._running():
                if gather.accumulators:
                    for batch in self.hidden.batches():
                        gather.add(self._normalized(block, sub, self.hidden[batch]))
                if solving:
                    self._solve_site(done, sub.reads, gather.values())
                self._round_inputs(done, sub.reads)
                gather = self._gather(block, sub.output, solving)
                width = block.weight(sub.output.name).shape[1]
                spill = self.scratch / f"inner-{number}.bin"
                inner = HiddenStates(
                    (count, length, width), self.fast, spill, self.hidden_limit - self.hidden.held_bytes
                )
                with self._without_output(block, sub):
                    for batch in self.hidden.batches():
                        inner[batch] = self._run(block, sub, self._normalized(block, sub, self.hidden[batch]))
                        gather.add(inner[batch])
                if solving:
                    self._solve_site(done, sub.output, gather.values())
                self._round_inputs(done, sub.output)
                output = block.module.get_submodule(sub.output.name)
                for batch in self.hidden.batches():
                    self.hidden[batch] += output(inner[batch])
                inner.close()

    def _gather(self, block: Block, site: Site, solving: bool) -> Gather:
        needs: set[str] = set()
        for path in site.linears:
            plan = self.plan.linears.get(block.full_name(path))
            if plan is not None and solving:
                needs |= plan.solver.solve_needs
                if plan.scheme.activations is not None and not plan.scheme.activations.dynamic:
                    needs.add("absmax")
        return Gather(needs, block.weight(site.name).shape[1])

    def _solve_site(self, done: SolvedBlock, site: Site, statistics: Statistics) -> None:
        """Solve the linears of ``site``; where statistics are used, those with one plan are solved as one weight.

        Rows are independent of each other, so that changes nothing but the time: one factor serves them all.
        """
        block = done.block
        together: dict[tuple[Any, ...], list[str]] = {}
        plans: dict[str, LinearPlan] = {}
        for path in site.linears:
            plan = self.plan.linears.get(block.full_name(path))
            if plan is not None:
                plans[path] = plan
                alone = path if not plan.solver.solve_needs else ""
                together.setdefault((id(plan.solver), plan.scheme.weights, alone), []).append(path)
        for paths in together.values():
            plan = plans[paths[0]]
            weights = [block.weight(p) for p in paths]
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            stored = plan.solver.solve(weight, plan.scheme.weights, statistics)
            start = 0
            for path in paths:
                stop = start + block.weight(path).shape[0]
                self._store(done, path, stored.rows(start, stop), plans[path], statistics)
                start = stop

    def _store(
        self, done: SolvedBlock, path: str, q: QuantizedTensor, plan: LinearPlan, statistics: Statistics
    ) -> None:
        original, value = done.block.weight(path), q.dequantize()
        facts: dict[str, Any] = {
            "name": done.block.full_name(path),
            "scheme": plan.scheme.label(),
            "step": plan.solver.name(),
        }
        facts["weight_error"] = float((value - original).norm() / original.norm().clamp(min=1e-12))
        if "second_moment" in statistics:
            h = statistics["second_moment"]
            nearest = round_to_nearest(original, q.scheme).dequantize()
            size = max(proxy_loss(original, torch.zeros_like(original), h), 1e-30)
            facts["error"] = proxy_loss(original, value, h) / size
            facts["baseline_error"] = proxy_loss(original, nearest, h) / size
        done.layers.append(facts)
        done.linears[path] = q
        if plan.scheme.activations is not None and not plan.scheme.activations.dynamic:
            done.input_scales[path] = static_scale(statistics["absmax"], plan.scheme.activations)
        done.block.set_weight(path, value)

    # -- forwards --------------------------------------------------------------------------------------------------

    @contextmanager
    def _running(self) -> Iterator[None]:
        autocast = torch.autocast("cpu", self.fast, enabled=self.fast is not torch.float32)
        with torch.no_grad(), autocast:
            yield

    def _normalized(self, block: Block, sub: Sublayer, x: Tensor) -> Tensor:
        return block.module.get_submodule(sub.norm)(x).to(self.fast)

    def _run(self, block: Block, sub: Sublayer, h: Tensor) -> Tensor:
        module = block.module.get_submodule(sub.module)
        if not sub.attention:
            return module(h)
        positions = torch.arange(h.shape[1])[None]
        return module(h, position_embeddings=self.rotary(h.float(), positions), attention_mask=None)[0]

    @contextmanager
    def _without_output(self, block: Block, sub: Sublayer) -> Iterator[None]:
        """Take the output linear out, so that the sublayer's module returns that linear's input."""
        path, _, leaf = sub.output.name.rpartition(".")
        owner = block.module.get_submodule(path)
        output = getattr(owner, leaf)
        setattr(owner, leaf, nn.Identity())
        try:
            yield
        finally:
            setattr(owner, leaf, output)

    def _round_inputs(self, done: SolvedBlock, site: Site) -> None:
        """From here on, round the inputs of the site's linears as the stored scheme will at run time."""
        for path in site.linears:
            plan = self.plan.linears.get(done.block.full_name(path))
            if plan is None or plan.scheme.activations is None:
                continue
            scheme, scale = plan.scheme.activations, done.input_scales.get(path)
            done.block.module.get_submodule(path).register_forward_pre_hook(
                lambda _, inputs, scheme=scheme, scale=scale: (round_activations(inputs[0], scheme, scale),)
            )
