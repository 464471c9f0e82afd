"""``frugallm.LLM``: a model that answers prompts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from reprlib import repr as short
from threading import Lock
from typing import Any

from frugallm.engine.opening import open_engine
from frugallm.engine.request import Event, Finish, Request
from frugallm.engine.sampler import TokenLogprobs
from frugallm.engine.sampling import SamplingParams
from frugallm.errors import DataError, JobError, ParameterError

Messages = Sequence[dict[str, str]]
Prompt = str | Sequence[int] | Messages


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt.

    Attributes
    ----------
    text
        Whole characters, without special tokens and without the stop string.
    tokens
        All tokens that were generated, those of the end included.
    finish, stop
        Why it ended (see :class:`~frugallm.engine.request.Event`), and the stop string or token.
    logprobs
        One for each token, where they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    stop: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Generation:
    """The answers to one prompt.

    Attributes
    ----------
    prompt
        Its tokens.
    answers
        ``n`` answers.
    seed
        The seed in use; the same one gives the same answers again.
    """

    prompt: tuple[int, ...]
    answers: tuple[Answer, ...]
    seed: int

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.answers[0].text


class LLM:
    """A model behind the engine. Safe to use from several threads and tasks.

    Parameters
    ----------
    model
        A name, a folder, a GGUF file, a hub id, or a loaded ``transformers`` model.
    tokenizer
        Tokenizer of a loaded model.
    cache_tokens
        Tokens whose keys and values the cache holds at once, of all requests together.
    step_tokens, sequences
        Most tokens and most answers of one step. They change speed and memory, never an answer.

    Attributes
    ----------
    note
        A line about how the model runs, where there is something to say.

    Examples
    --------
    >>> from frugallm import LLM, SamplingParams
    >>> llm = LLM("smollm2-135m")  # doctest: +SKIP
    >>> llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=8))[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        cache_tokens: int | None = None,
        step_tokens: int = 512,
        sequences: int = 64,
    ) -> None:
        self.engine, self.note = open_engine(model, tokenizer, cache_tokens, step_tokens, sequences)
        self.tokenizer = self.engine.tokenizer
        self._lock = Lock()
        self._abandoned: deque[Request] = deque()
        # All steps for tasks come from one thread: torch keeps a team of threads for each that calls it.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="frugallm")

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Answer prompts, all of them together.

        Parameters
        ----------
        prompts
            One or several of: a text; token ids; messages ``{"role": ..., "content": ...}``, which go through the
            model's chat template.
        params
            For all prompts, or one for each.

        Raises
        ------
        DataError
            If a prompt cannot be answered; nothing is computed then.
        ParameterError
            If parameters do not suit the model or the prompts.
        """
        several = _several(prompts)
        each: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params] * len(several)
        if len(each) != len(several):
            raise ParameterError(f"{len(each)} sampling parameters for {len(several)} prompts")
        requests: list[Request] = []
        try:
            for prompt, wanted in zip(several, each):
                requests.append(self._add(prompt, wanted))
            for request in requests:
                while not request.finished:
                    self._step()
        finally:
            for request in requests:
                self._cancel(request)
        for request in requests:
            _raise_fault(request)
        return [_generation(request) for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Event]:
        """Answer one prompt, token by token; whoever stops listening cancels it."""
        request = self._add(prompt, params)
        try:
            while True:
                while request.events:
                    yield request.events.popleft()
                if request.finished:
                    break
                self._step()
        finally:
            self._cancel(request)
        _raise_fault(request)

    async def astream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[Event]:
        """Answer one prompt, token by token, for tasks of ``asyncio``; any number of them share the steps."""
        loop = asyncio.get_running_loop()
        adding = self._worker.submit(self._add, prompt, params)
        try:
            request = await asyncio.wrap_future(adding)
        except asyncio.CancelledError:
            adding.add_done_callback(self._unwanted)  # the worker may have begun, and nobody else will know
            raise
        try:
            while True:
                while request.events:
                    yield request.events.popleft()
                if request.finished:
                    break
                await loop.run_in_executor(self._worker, self._step_for, request)
        finally:
            self._cancel(request)
        _raise_fault(request)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt: a text as it is, messages in the model's chat template."""
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # an array of token ids
        if isinstance(prompt, str):
            return self._tokens(prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise DataError(f"a prompt must be a text, token ids or messages; got {short(prompt)}")
        if all(isinstance(token, Integral) for token in prompt):
            return [int(token) for token in prompt]  # type: ignore[arg-type]
        # The template has written the special tokens already.
        return self._tokens(self._written(prompt), add_special_tokens=False)

    def _written(self, messages: Sequence[Any]) -> str:
        """Return messages as the model's chat template writes them."""
        for message in messages:
            if not isinstance(message, dict) or not all(
                isinstance(message.get(part), str) for part in ("role", "content")
            ):
                raise DataError(
                    f"a prompt cannot hold {short(message)}",
                    "Give a text, token ids, or messages with a role and a content, both texts",
                )
        if not self.tokenizer.chat_template:
            raise DataError("the model has no chat template", "Give the prompt as one text")
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
            )
        # What an expression of the template does wrong comes as Python's own error.
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"the model's chat template refuses these messages ({error})") from error

    def _tokens(self, text: str, **how: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"character {error.start + 1} of the prompt is no Unicode character", "Give it in UTF-8"
            ) from error
        return list(self.tokenizer(text, verbose=False, **how)["input_ids"])

    def close(self) -> None:
        """Let the thread for tasks go; an LLM that goes out of use needs no call."""
        self._worker.shutdown()

    def _add(self, prompt: Any, params: SamplingParams | None) -> Request:
        if not isinstance(params, SamplingParams | None):
            raise ParameterError(f"parameters must be SamplingParams; got {short(params)}")
        tokens = self.encode(prompt)
        with self._lock:
            return self.engine.add(tokens, params or SamplingParams())

    def _step(self) -> None:
        with self._lock:
            self.engine.step()
        self._settle()

    def _step_for(self, request: Request) -> None:
        """Compute a step, unless one for another task has brought this request something meanwhile."""
        if not request.events and not request.finished:
            self._step()

    def _cancel(self, request: Request) -> None:
        """End a request, at once or behind the step under way; never wait, for an event loop may be calling."""
        if not request.finished:
            self._abandoned.append(request)
            self._settle()

    def _unwanted(self, adding: Future[Request]) -> None:
        """End a request whose task went before it knew of it."""
        if not adding.cancelled() and adding.exception() is None:
            self._cancel(adding.result())

    def _settle(self) -> None:
        # Whoever holds the lock comes here after letting go of it, so nothing stays behind.
        while self._abandoned and self._lock.acquire(blocking=False):
            try:
                while self._abandoned:
                    self.engine.cancel(self._abandoned.popleft())
            finally:
                self._lock.release()


def _several(prompts: Any) -> list[Any]:
    """Return what may be one prompt or several as a list of prompts."""
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(prompts, (str, bytes, dict)) or not isinstance(prompts, Iterable):
        return [prompts]
    listed = list(prompts)
    one = bool(listed) and all(isinstance(part, (Integral, dict)) for part in listed)
    return [listed] if one else listed


def _raise_fault(request: Request) -> None:
    if request.fault is not None:
        what = request.fault if str(request.fault) else type(request.fault).__name__
        raise JobError(f"an answer could not be finished ({what})") from request.fault


def _generation(request: Request) -> Generation:
    answers = tuple(
        Answer("".join(s.texts), tuple(s.output), s.finish or "fault", s.stop, tuple(s.logprobs))
        for s in request.sequences
    )
    return Generation(request.prompt, answers, request.seed)
