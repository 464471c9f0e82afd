"""What is asked of the engine, and how far it has come."""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from frugallm.engine.blocks import ROOT, chain
from frugallm.engine.constraints import Constraint
from frugallm.engine.detokenize import StopStrings, TextStream
from frugallm.engine.sampler import TokenLogprobs
from frugallm.engine.sampling import SamplingParams

Finish = Literal["stop", "length", "cancelled", "fault"]
_tickets = itertools.count()


@dataclass(frozen=True)
class Event:
    """What one step brought for one answer.

    Attributes
    ----------
    choice
        Number of the answer, 0 to ``n - 1``.
    text
        New text, whole characters; may be empty.
    token
        The new token; ``None`` where an answer ends without one.
    finish
        Why the answer ended: ``"stop"`` (its own end, or what was asked for), ``"length"``, ``"cancelled"`` or
        ``"fault"``; ``None``: it goes on.
    stop
        The stop string or token that ended it.
    """

    choice: int
    text: str
    token: int | None
    logprobs: TokenLogprobs | None = None
    finish: Finish | None = None
    stop: str | int | None = None


class Sequence:
    """One answer: its tokens, and the part of them whose keys and values exist.

    There is no phase of reading and none of writing: a sequence has tokens that are still to be computed.

    Attributes
    ----------
    tokens
        Prompt and answer.
    computed
        How many of them have keys and values in the blocks of ``table``.
    siblings
        Further answers to the same prompt, which wait until it is computed.
    constraint
        What the answer must follow.
    """

    def __init__(self, request: Request, choice: int, tokenizer: Any) -> None:
        self.request, self.choice = request, choice
        self.tokens = list(request.prompt)
        self.computed = 0
        self.table: list[int] = []
        self.siblings: list[Sequence] = []
        self.constraint: Constraint | None = None
        self.finish: Finish | None = None
        self.stop: str | int | None = None
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self.stream = TextStream(tokenizer)
        self.stops = StopStrings(request.params.stop)
        self._digests: list[bytes] = []

    @property
    def order(self) -> tuple[int, int]:
        """Who came first is served first and preempted last."""
        return self.request.ticket, self.choice

    @property
    def need(self) -> int:
        """Tokens still to compute."""
        return len(self.tokens) - self.computed

    @property
    def output(self) -> list[int]:
        """Tokens of the answer so far."""
        return self.tokens[len(self.request.prompt) :]

    def digests(self, size: int, tokens: int) -> list[bytes]:
        """Return the hashes of the first ``tokens`` tokens at the end of each full block."""
        while (len(self._digests) + 1) * size <= tokens:
            start = len(self._digests) * size
            previous = self._digests[-1] if self._digests else ROOT
            self._digests.append(chain(previous, self.tokens[start : start + size]))
        return self._digests[: tokens // size]


@dataclass(eq=False)
class Request:
    """A prompt, how its answers are to be chosen, and these answers.

    Attributes
    ----------
    prompt
        Token ids.
    seed
        The seed in use, drawn where the parameters leave it open.
    events
        What happened since somebody last looked.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    tokenizer: Any
    ticket: int = field(default_factory=lambda: next(_tickets))
    events: deque[Event] = field(default_factory=deque)
    fault: BaseException | None = None

    def __post_init__(self) -> None:
        self.seed = self.params.seed if self.params.seed is not None else secrets.randbits(63)
        self.sequences = [Sequence(self, choice, self.tokenizer) for choice in range(self.params.n)]

    @property
    def finished(self) -> bool:
        """Whether all answers have ended."""
        return all(sequence.finish for sequence in self.sequences)
