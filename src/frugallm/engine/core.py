"""The engine: requests in, events out, one step at a time. One thread at a time may be in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frugallm.engine.blocks import Blocks
from frugallm.engine.constraints import Constraints
from frugallm.engine.request import Event, Finish, Request, Sequence
from frugallm.engine.runner import Runner
from frugallm.engine.sampler import choose, logprobs
from frugallm.engine.sampling import SamplingParams
from frugallm.engine.scheduler import Scheduler, Step
from frugallm.errors import DataError, JobError, ParameterError


@dataclass(frozen=True)
class Limits:
    """Sizes of an engine, all in tokens but ``sequences``.

    Attributes
    ----------
    context
        Positions that the model knows.
    vocabulary
        Logits of one row.
    step, sequences
        Most tokens and most sequences of one step.
    """

    context: int
    vocabulary: int
    step: int = 512
    sequences: int = 64


class Answering(ABC):
    """Takes requests and hands out what their steps bring; a subclass says how a step is computed.

    Parameters
    ----------
    blocks
        Blocks of the cache.
    tokenizer
        Turns tokens into text.
    ends
        Tokens with which the model ends a text.
    """

    def __init__(self, blocks: Blocks, tokenizer: Any, limits: Limits, ends: frozenset[int]) -> None:
        self.blocks, self.tokenizer, self.limits, self.ends = blocks, tokenizer, limits, ends
        self.scheduler = Scheduler(self.blocks, limits.step, limits.sequences)
        self.requests: set[Request] = set()
        self._constraints = Constraints(tokenizer, limits.vocabulary, ends)
        self.longest = min(limits.context, blocks.count * blocks.size)

    @abstractmethod
    def _work(self) -> None:
        """Compute one step of what is scheduled, and choose a token where one is due."""

    def add(self, prompt: Tokens[int], params: SamplingParams) -> Request:
        """Take a request.

        Raises
        ------
        DataError
            If the prompt is empty, holds unknown tokens, or leaves no room for an answer.
        ParameterError
            If the parameters do not suit the model.
        """
        self._check(prompt, params)
        constraint = self._constraints.make(params)
        request = Request(tuple(prompt), params, self.tokenizer)
        first, *siblings = request.sequences
        first.siblings = siblings
        for sequence in request.sequences:
            sequence.constraint = constraint.copy() if constraint else None
        self.requests.add(request)
        self.scheduler.add(first)
        return request

    def cancel(self, request: Request, finish: Finish = "cancelled") -> None:
        """End a request at whatever stage it is; one that has ended stays as it is."""
        for sequence in request.sequences:
            if sequence.finish is None:
                self._end(sequence, finish)

    def step(self) -> None:
        """Compute one step, and put what it brought into the requests' events.

        A fault ends all requests, for nobody knows what the cache holds then.
        """
        if not self.requests:
            return
        try:
            self._work()
        except BaseException as error:
            self._fail(error)
            raise

    def check(self) -> None:
        """Check that no block is lost; raises :class:`JobError`."""
        self.blocks.check(s.table for request in self.requests for s in request.sequences)

    def _check(self, prompt: Tokens[int], params: SamplingParams) -> None:
        if not prompt:
            raise DataError("the prompt is empty", "Give it at least one token")
        unknown = [token for token in prompt if not 0 <= token < self.limits.vocabulary]
        if unknown:
            raise DataError(f"the prompt holds token {unknown[0]}, the model has {self.limits.vocabulary}")
        if len(prompt) >= self.limits.context:
            raise DataError(
                f"the prompt has {len(prompt)} tokens, the model's context {self.limits.context}",
                "Shorten it; the answer needs room as well",
            )
        if len(prompt) >= self.longest:
            raise DataError(
                f"the prompt has {len(prompt)} tokens, the cache holds {self.longest}", "Raise cache_tokens"
            )
        if params.n > self.limits.sequences:
            raise ParameterError(f"n is {params.n}, a step holds {self.limits.sequences} sequences")
        params.check_tokens(self.limits.vocabulary)

    def _choose(self, sequence: Sequence, row: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        request, params = sequence.request, sequence.request.params
        try:
            allowed = sequence.constraint.allowed() if sequence.constraint else None
        except JobError as error:  # of this answer alone
            request.fault = error
            self._end(sequence, "fault")
            return
        token = choose(row, params, request.prompt, sequence.output, request.seed, sequence.choice, allowed)
        beside = None if params.logprobs is None else logprobs(row, token, params.logprobs)
        request.events.append(self._accept(sequence, token, beside))

    def _accept(self, sequence: Sequence, token: int, beside: Any) -> Event:
        """Append a token to an answer, with its text, and see whether that ends it."""
        params = sequence.request.params
        sequence.tokens.append(token)
        if beside is not None:
            sequence.logprobs.append(beside)
        finish: Finish | None = None
        stop: str | int | None = None
        text = ""
        complete = sequence.constraint is not None and sequence.constraint.accept(token)
        if token in params.stop_token_ids or (token in self.ends and not params.ignore_eos):
            finish, stop = "stop", token
        else:
            text, stop = sequence.stops.push(sequence.stream.push(token))
            length = len(sequence.tokens) - len(sequence.request.prompt)
            if stop is not None or complete:
                finish = "stop"
            elif length >= params.max_tokens or len(sequence.tokens) >= self.longest:
                finish = "length"
        if finish is not None:
            if not isinstance(stop, str):
                more, word = sequence.stops.push(sequence.stream.flush())
                stop, text = (
                    (stop, text + more + sequence.stops.flush()) if word is None else (word, text + more)
                )
            self._finish(sequence, finish, stop)
        sequence.texts.append(text)
        return Event(sequence.choice, text, token, beside, finish, stop)

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        """End an answer that gets no further token."""
        self._finish(sequence, finish)
        sequence.request.events.append(Event(sequence.choice, "", None, finish=finish))

    def _finish(self, sequence: Sequence, finish: Finish, stop: str | int | None = None) -> None:
        sequence.finish, sequence.stop = finish, stop
        self.scheduler.remove(sequence)
        if sequence.request.finished:
            self.requests.discard(sequence.request)

    def _fail(self, error: BaseException) -> None:
        for request in tuple(self.requests):
            request.fault = error
            self.cancel(request, "fault")
        self.blocks.forget()


class Engine(Answering):
    """Batches requests over one runner.

    Parameters
    ----------
    runner
        Computes steps; its cache has ``blocks`` blocks.
    tokenizer, limits, ends
        See :class:`Answering`.
    """

    def __init__(
        self, runner: Runner, blocks: int, tokenizer: Any, limits: Limits, ends: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(Blocks(blocks, runner.block_size), tokenizer, limits, ends)
        self.runner = runner

    def _work(self) -> None:
        step = self.scheduler.schedule()
        if not step.parts:
            raise JobError("the engine has requests and nothing to compute", "Report this")
        self._receive(step, self._compute(step))

    def _compute(self, step: Step) -> Tensor:
        for copy in step.copies:
            self.runner.copy_block(copy.source, copy.target)
        tokens: list[int] = []
        positions: list[int] = []
        starts, rows = [0], []
        for sequence, count in step.parts:
            stop = sequence.computed + count
            tokens += sequence.tokens[sequence.computed : stop]
            positions += range(sequence.computed, stop)
            starts.append(len(tokens))
            if stop == len(sequence.tokens):
                rows.append(len(tokens) - 1)
        tables = np.full((len(step.parts), max(len(s.table) for s, _ in step.parts)), -1, np.int32)
        for i, (sequence, _) in enumerate(step.parts):
            tables[i, : len(sequence.table)] = sequence.table
        return self.runner.step(
            _int32(tokens), _int32(positions), _int32(starts), torch.from_numpy(tables), _int32(rows)
        )

    def _receive(self, step: Step, logits: Tensor) -> None:
        """Note what was computed, and choose a token for every sequence that has come to its end."""
        rows = iter(logits.numpy())
        for sequence, count in step.parts:
            self._register(sequence, count)
            if sequence.need:
                continue
            row = next(rows)
            siblings, sequence.siblings = sequence.siblings, []
            for sibling in siblings:
                sibling.table = self.blocks.fork(sequence.table)
                sibling.computed = sequence.computed
                self.scheduler.run(sibling)
            for each in (sequence, *siblings):
                self._choose(each, row)

    def _register(self, sequence: Sequence, count: int) -> None:
        """Note ``count`` computed tokens; blocks that are full now become known to others."""
        size, full = self.blocks.size, sequence.computed // self.blocks.size
        sequence.computed += count
        digests = sequence.digests(size, sequence.computed)
        for block in range(full, len(digests)):
            self.blocks.register(sequence.table[block], digests[block])


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
