"""The walk: load one block, run the calibration windows through it, let the methods work on it, write it, let it go.

A block's linears are solved in the order in which they are computed. The windows stop in front of each site, the
statistics of its input are complete, its linears are solved, and the windows go on through the stored values. So every
linear sees inputs that have passed through everything stored before it, at the price of one forward per block.

Where a step asks for it, a second stream of hidden states goes along, those of the original model, and a solved block is
trained to compute what the original does; where none does, neither costs anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from frugallm.compress.plan import Plan
from frugallm.models.checkpoint import Checkpoint, meta_model
from frugallm.models.family import Site, Sublayer, parallel
from frugallm.walk.block import Block
from frugallm.walk.forward import Call, Entrance, input_of, replaced, watched
from frugallm.walk.hidden import HIDDEN_LIMIT, HiddenStates
from frugallm.walk.reconstruction import reconstruct
from frugallm.walk.sites import SiteSolver
from frugallm.walk.solved import SolvedBlock
from frugallm.walk.statistics import Gather, Statistics


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
    seed
        Decides what steps draw at random.
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
        seed: int = 0,
    ) -> None:
        self.checkpoint, self.plan, self.windows = checkpoint, plan, windows
        self.scratch, self.fast, self.stored, self.hidden_limit = scratch, fast, stored, hidden_limit
        self.seed = seed
        self.sites = SiteSolver(plan, fast, stored)
        self.family, self.config = checkpoint.family, checkpoint.config
        self.skeleton = meta_model(checkpoint)
        self.blocks = list(self.skeleton.get_submodule(self.family.blocks))
        self.hidden: HiddenStates | None = None
        self.original: HiddenStates | None = None  # of the original model, if a step of the plan reads them
        self.calls: list[Call] = []

    def __len__(self) -> int:
        return len(self.blocks)

    # -- the ends of the model -------------------------------------------------------------------------------------

    def embed(self, rows: Callable[[int, int], Tensor]) -> None:
        """Fill the hidden states from the table's rows ``rows(start, stop)`` as they are stored, chunk by chunk."""
        if self.windows is None:
            return
        shape = (*self.windows.shape, self.config.hidden_size)
        entrance = Entrance(self.skeleton, self.family, self._as_stored)
        self.hidden = self._states(shape, torch.float32, "hidden")
        entrance.fill(self.hidden, self.windows, rows)
        if self.plan.reads_original:
            own_rows = partial(self.checkpoint.rows, f"{self.family.embedding}.weight")
            self.original = self._states(shape, torch.float32, "original")
            entrance.fill(self.original, self.windows, own_rows)
        entrance(self.hidden[:1])  # one window's rotary values and mask serve any number
        self.calls = entrance.calls()

    def _states(self, shape: tuple[int, int, int], dtype: torch.dtype, name: str) -> HiddenStates:
        """Return room for hidden states, in memory as long as all that are held stay within the limit."""
        held = sum(states.held_bytes for states in (self.hidden, self.original) if states is not None)
        return HiddenStates(shape, dtype, self.scratch / f"{name}.bin", self.hidden_limit - held)

    def close(self) -> None:
        """Let the hidden states go."""
        for states in (self.hidden, self.original):
            if states is not None:
                states.close()

    def _as_stored(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name).to(self.stored).float()

    def load(self, index: int, state: dict[str, Tensor] | None = None) -> Block:
        """Return block ``index`` from the checkpoint, or from ``state`` as it was stored."""
        return Block(
            self.blocks[index],
            self.checkpoint.block_state(index) if state is None else state,
            self.family,
            index,
            self.config,
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
        steps = self.plan.reconstructing(done.block.full_name(path) for path in done.block.linears)
        if steps or self.original is not None:
            done.reference = self.load(index, dict(done.block.state))
        done.block.round_to(self.stored)
        before, inputs = (dict(done.block.state), self._copy(index)) if steps else ({}, None)
        done.seconds["rewrite"] = time.perf_counter() - started
        self._advance(done, solving=True)
        if inputs is not None and self.hidden is not None:
            reconstruct(self, done, steps, before, inputs)
            self.hidden.close()
            self.hidden = inputs
            now = {done.block.full_name(path): parameters for path, parameters in done.inputs.items()}
            self._pass(index, done.block.state, lambda name: now.get(name, {}))
        done.reference = None
        self._advance_original(index)
        done.seconds["total"] = time.perf_counter() - started
        return done

    def _copy(self, index: int) -> HiddenStates:
        assert self.hidden is not None
        copy = self._states(self.hidden.shape, torch.float32, f"hidden-{index}")
        copy.values.copy_(self.hidden.values)
        return copy

    def replay(
        self, index: int, state: dict[str, Tensor], input_parameters: Callable[[str], dict[str, Tensor]]
    ) -> None:
        """Move the hidden states through block ``index`` as it was stored; ``input_parameters`` by full name."""
        self._pass(index, state, input_parameters)
        self._advance_original(index)

    def _pass(
        self, index: int, state: dict[str, Tensor], input_parameters: Callable[[str], dict[str, Tensor]]
    ) -> None:
        done = SolvedBlock(self.load(index, state))
        for path in done.block.linears:
            plan = self.plan.linears.get(done.block.full_name(path))
            if plan is not None and plan.scheme.activations is not None:
                done.inputs[path] = input_parameters(done.block.full_name(path))
        self._advance(done, solving=False)

    def _advance_original(self, index: int) -> None:
        """Take the original model's hidden states through block ``index`` as it was, rewritten or not."""
        if self.original is None or index + 1 == len(self):  # nobody reads what the last block gives
            return
        module, call = self.load(index).module, self.calls[index]
        with self._running():
            for batch in self.original.batches():
                self.original[batch] = call(module, self.original[batch])

    def observe(self, block: Block, needs: frozenset[str]) -> dict[str, Statistics]:
        """Return statistics of every site of ``block`` as it is, the hidden states untouched."""
        gathers = {s.name: Gather(needs, block.weight(s.name).shape[1]) for s in block.sites}
        assert self.hidden is not None
        call = self.calls[block.index]
        with (
            self._running(),
            watched(block, block.sites, lambda site, x: gathers[site.name].add(x.to(self.fast))),
        ):
            for batch in self.hidden.batches():
                call(block.module, self.hidden[batch])
        return {name: gather.values() for name, gather in gathers.items()}

    def effects(self, block: Block, variants: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return what other weights change of what leaves ``block``; block and hidden states stay as they are.

        Parameters
        ----------
        variants
            Name to the weights ``(out, in)`` that are put in, by path.

        Returns
        -------
        dict
            Name to the squared change of a token's state, relative to that state's square, as a mean over the tokens.
        """
        assert self.hidden is not None
        call, found = self.calls[block.index], dict.fromkeys(variants, 0.0)
        with self._running():
            for batch in self.hidden.batches():
                before = call(block.module, self.hidden[batch]).float()
                size = before.square().sum(-1).clamp(min=1e-30)
                for name, weights in variants.items():
                    own = {path: block.weight(path).clone() for path in weights}
                    for path, weight in weights.items():
                        block.set_weight(path, weight)
                    change = call(block.module, self.hidden[batch]).float() - before
                    found[name] += (change.square().sum(-1) / size).double().sum().item()
                    for path, weight in own.items():
                        block.set_weight(path, weight)
        tokens = math.prod(self.hidden.values.shape[:2])
        return {name: total / tokens for name, total in found.items()}

    def _advance(self, done: SolvedBlock, *, solving: bool) -> None:
        """Stop in front of each site, solve it if asked to, and take the hidden states to the block's output."""
        block = done.block
        if self.hidden is None:
            for site in block.sites:
                self.sites.solve(done, site, {})
            return
        late: list[tuple[Sublayer, HiddenStates]] = []
        with self._running():
            for number, sub in enumerate(block.graph):
                gather = self.sites.gather(block, sub.reads, solving)
                if gather:
                    for batch in self.hidden.batches():
                        x = self._input(block, sub, sub.reads, batch)
                        gather.add(x, self._original_input(done, gather, sub.reads, batch))
                self._finish_site(done, sub.reads, gather, solving)
                if sub.routed:
                    self._through_experts(done, sub, solving)
                    continue
                inner = self._through_output(done, sub, number, solving)
                if parallel(self.config):
                    late.append((sub, inner))
                else:
                    self._add(block, [(sub, inner)])
            if late:
                self._add(block, late)

    def _through_output(self, done: SolvedBlock, sub: Sublayer, number: int, solving: bool) -> HiddenStates:
        """Solve the one output of a sublayer; return that linear's inputs."""
        assert self.hidden is not None
        block, (site,) = done.block, sub.outputs
        gather = self.sites.gather(block, site, solving)
        count, length, _ = self.hidden.values.shape
        shape = (count, length, block.weight(site.name).shape[1])
        inner = self._states(shape, self.fast, f"inner-{number}")
        for batch in self.hidden.batches():
            inner[batch] = self._input(block, sub, site, batch)
            gather.add(inner[batch], self._original_input(done, gather, site, batch))
        self._finish_site(done, site, gather, solving)
        return inner

    def _through_experts(self, done: SolvedBlock, sub: Sublayer, solving: bool) -> None:
        """Solve the outputs of all experts, each with the tokens sent to it, and take the hidden states through them.

        How many tokens come to an expert is not known beforehand, so their inputs are not kept but computed twice.
        """
        assert self.hidden is not None
        block, call = done.block, self.calls[done.block.index]
        gathers = {site.name: self.sites.gather(block, site, solving) for site in sub.outputs}
        others = [(other, None) for other in block.graph if other is not sub]
        with replaced(block, others):
            if any(gathers.values()):
                with watched(block, sub.outputs, lambda site, x: gathers[site.name].add(x.to(self.fast))):
                    for batch in self.hidden.batches():
                        call(block.module, self.hidden[batch])
            for site in sub.outputs:
                self._finish_site(done, site, gathers[site.name], solving)
            for batch in self.hidden.batches():
                self.hidden[batch] = call(block.module, self.hidden[batch])

    def _finish_site(self, done: SolvedBlock, site: Site, gather: Gather, solving: bool) -> None:
        if solving:
            # Forwards run in bf16; a solver's own products must not.
            with torch.autocast("cpu", enabled=False):
                self.sites.solve(done, site, gather.values())
        self.sites.round_inputs(done, site)

    def _add(self, block: Block, inputs: list[tuple[Sublayer, HiddenStates]]) -> None:
        """Take the hidden states to what the block makes of them, with sublayers computed from their outputs' inputs."""
        assert self.hidden is not None
        call, known = self.calls[block.index], [sub for sub, _ in inputs]
        rest = [(sub, None) for sub in block.graph if sub not in known]
        outputs = [(sub, block.module.get_submodule(sub.outputs[0].name), inner) for sub, inner in inputs]
        for batch in self.hidden.batches():
            values = [(sub, output(inner[batch])) for sub, output, inner in outputs]
            with replaced(block, [*rest, *values]):
                self.hidden[batch] = call(block.module, self.hidden[batch])
        for _, inner in inputs:
            inner.close()

    def _input(self, block: Block, sub: Sublayer, site: Site, batch: slice) -> Tensor:
        assert self.hidden is not None
        return input_of(block, site, self.calls[block.index], self.hidden[batch], sub).to(self.fast)

    def _original_input(self, done: SolvedBlock, gather: Gather, site: Site, batch: slice) -> Tensor | None:
        """Return the original model's input of ``site``, where a statistic compares it with the stored one's."""
        if not gather.pairs:
            return None
        assert done.reference is not None and self.original is not None
        call = self.calls[done.block.index]
        return input_of(done.reference, site, call, self.original[batch]).to(self.fast)

    # -- forwards --------------------------------------------------------------------------------------------------

    @contextmanager
    def _running(self) -> Iterator[None]:
        autocast = torch.autocast("cpu", self.fast, enabled=self.fast is not torch.float32)
        with torch.no_grad(), autocast:
            yield
