"""How fast a model answers here, and which share of the machine's limit that is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict

from frugallm.engine.core import Engine
from frugallm.engine.llm import LLM
from frugallm.engine.sampling import SamplingParams
from frugallm.errors import JobError, ModelError
from frugallm.evaluate.speed import Rate

if TYPE_CHECKING:
    from frugallm.kernels.decoder import Decoder
    from frugallm.kernels.packing import PackedLinear

FIRST_PROMPT = "Hello"


@dataclass(frozen=True)
class Sizes:
    """How much is computed in one repeat, in tokens.

    Attributes
    ----------
    prefill
        Of the prompt that is only read.
    prompt, answer
        Of every prompt and answer of the batch; one stream begins with as long a prompt and writes as much.
    streams
        Answers of the batch.
    """

    prefill: int = 512
    prompt: int = 128
    answer: int = 128
    streams: int = 8


class Figure(BaseModel):
    """A rate, and its share of what the machine does at most.

    Attributes
    ----------
    share
        Time at the limit over time taken; ``None`` where the weights' layout is not known (no native runner).
    limit
        The limit in question.
    """

    model_config = ConfigDict(frozen=True)

    rate: Rate
    share: float | None
    limit: str


class Speed(BaseModel):
    """What :func:`measure` found.

    Attributes
    ----------
    path
        What computed it: a path of the native kernels, ``reference``, or ``transformers``.
    note
        Why it is not native, where there is something to say.
    limits
        Medians over the repeats of what the machine did: ``memory`` in bytes a second, ``bf16``, ``int8`` in operations a
        second.
    prefill, decode, batch
        Tokens of a prompt; of one answer behind its first; of all answers of a batch, their prompts' time included.
    start
        From the start of a process of its own to the first token, in seconds.
    peak_bytes
        Most anonymous memory of this process while the model was opened and answered.
    weights_bytes, cache_bytes
        Bytes of packed weights, and of the cache's room, with a native runner.
    machine, versions
        What was it measured on and with.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    path: str
    note: str
    threads: int
    sizes: dict[str, int]
    limits: dict[str, float]
    prefill: Figure
    decode: Figure
    batch: Figure
    start: Rate
    peak_bytes: int
    weights_bytes: int | None
    cache_bytes: int | None
    machine: dict[str, Any]
    versions: dict[str, str]


def measure(model: str, sizes: Sizes | None = None, repeats: int = 5) -> Speed:
    """Measure a model's speed with as many threads as torch uses.

    Everything is repeated in turn, so that what drifts on the machine meets all of it alike; medians count. Prompts are
    random tokens, other ones in every repeat, so nothing of them is known from before.

    Parameters
    ----------
    model
        What :class:`~frugallm.engine.llm.LLM` opens by name.
    repeats
        How often each part is measured, after a first time that does not count.

    Raises
    ------
    ModelError
        If the model's context is too short for these sizes, or it cannot be opened.
    JobError
        If a process started for the first token fails.
    """
    from frugallm.evaluate.machine import machine, versions
    from frugallm.evaluate.memory import AnonymousPeak
    from frugallm.kernels.limits import limits

    sizes = sizes or Sizes()
    about = machine()
    with AnonymousPeak() as opening:
        llm = LLM(model)
        _check_context(llm, sizes)
        trial = Trial(llm, sizes)
        trial.run()
    peak, runs, found, starts = opening.peak, [], [], []
    for _ in range(repeats):
        found.append(limits(rounds=3))  # not within what is watched: it takes memory of its own
        with AnonymousPeak() as memory:
            runs.append(trial.run())
        peak = max(peak, memory.peak)
        starts.append(start_seconds(model))
    middle = {name: Rate.of([one[name] for one in found]).value for name in found[0]}
    runner = getattr(llm.engine, "runner", None)  # a model run by transformers has none
    decoder = getattr(runner, "decoder", None)
    prefill, decode, batch = (Rate.of(rates) for rates in zip(*runs))
    best = at_limit(decoder, sizes, middle) if decoder is not None else None

    def figure(rate: Rate, limit: str, name: str) -> Figure:
        return Figure(rate=rate, share=rate.value / best[name] if best else None, limit=limit)

    return Speed(
        model=model,
        path=_path(llm),
        note=llm.note,
        threads=torch.get_num_threads(),
        sizes=vars(sizes),
        limits=middle,
        prefill=figure(prefill, "products", "prefill"),
        decode=figure(decode, "reading weights", "decode"),
        batch=figure(batch, "products, then the slower of both", "batch"),
        start=Rate.of(starts, "s"),
        peak_bytes=peak,
        weights_bytes=weights_bytes(decoder) if decoder is not None else None,
        cache_bytes=getattr(runner, "cache_bytes", None),
        machine=about,
        versions=versions(),
    )


class Trial:
    """One repeat after the other of prefill, decode and batch, never with the same tokens."""

    def __init__(self, llm: LLM, sizes: Sizes) -> None:
        self._llm, self._sizes = llm, sizes
        self._random = torch.Generator().manual_seed(0)

    def run(self) -> tuple[float, float, float]:
        """Return tokens a second of prefill, decode and batch."""
        return self.prefill(), self.decode(), self.batch()

    def prefill(self) -> float:
        """Return the tokens of a prompt a second, its answer's first token included."""
        prompt = self._prompt(self._sizes.prefill)
        begin = time.perf_counter()
        self._llm.generate(prompt, _answer(1))
        return self._sizes.prefill / (time.perf_counter() - begin)

    def decode(self) -> float:
        """Return the tokens of one answer a second, counted from its first on."""
        times = [
            time.perf_counter()
            for _ in self._llm.stream(self._prompt(self._sizes.prompt), _answer(self._sizes.answer + 1))
        ]
        return (len(times) - 1) / (times[-1] - times[0])

    def batch(self) -> float:
        """Return the tokens of all answers of a batch a second, from the first prompt's start to the last token."""
        prompts = [self._prompt(self._sizes.prompt) for _ in range(self._sizes.streams)]
        begin = time.perf_counter()
        done = self._llm.generate(prompts, _answer(self._sizes.answer))
        return sum(len(one.answers[0].tokens) for one in done) / (time.perf_counter() - begin)

    def _prompt(self, length: int) -> list[int]:
        vocabulary = self._llm.engine.limits.vocabulary
        drawn: list[int] = torch.randint(0, vocabulary, (length,), generator=self._random).tolist()
        return drawn


def at_limit(decoder: Decoder, sizes: Sizes, limits: dict[str, float]) -> dict[str, float]:
    """Return the rates that the machine's limits allow: no product faster than the peak, every weight read once a step.

    Attention, norms and the choice of tokens count for nothing, so 100 % cannot be reached. Weights in codes are held
    against the peak of int8, floats against that of bf16.

    Returns
    -------
    dict
        ``prefill``, ``decode`` and ``batch`` in tokens a second, as :class:`Speed` counts them.
    """
    linears = _linears(decoder)

    def products(weights: list[PackedLinear]) -> float:
        return sum(
            2 * w.rows * w.width / limits["int8" if w.kind.startswith("int") else "bf16"] for w in weights
        )

    token, reading = products(linears), sum(w.nbytes for w in [*linears, decoder.head]) / limits["memory"]
    step = max(reading, sizes.streams * products([*linears, decoder.head]))
    whole = sizes.streams * sizes.prompt * token + (sizes.answer - 1) * step
    return {"prefill": 1 / token, "decode": 1 / reading, "batch": sizes.streams * sizes.answer / whole}


def weights_bytes(decoder: Decoder) -> int:
    """Return the bytes of all packed weights; a tied table counts once."""
    tables = [decoder.head] + ([decoder.embedding] if decoder.embedding is not decoder.head else [])
    return sum(weight.nbytes for weight in [*_linears(decoder), *tables])


def start_seconds(model: str) -> float:
    """Return the seconds from the start of ``frugal generate`` in a process of its own to its first token."""
    command = [sys.executable, "-m", "frugallm", "generate", model, "-p", FIRST_PROMPT]
    count = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    begin = time.perf_counter()
    with subprocess.Popen(
        [*command, "--raw", "--max-new-tokens", "1"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        taken = time.perf_counter() - begin
        _, said = process.communicate()
    if process.returncode:
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise JobError(f"the process for the first token failed ({last.removeprefix('error: ')})")
    return taken


def _answer(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def _linears(decoder: Decoder) -> list[PackedLinear]:
    return [w for layer in decoder.layers for w in (layer.qkv, layer.output, layer.gate_up, layer.down)]


def _check_context(llm: LLM, sizes: Sizes) -> None:
    longest = max(sizes.prefill + 1, sizes.prompt + sizes.answer + 1)
    if llm.engine.longest < longest:
        raise ModelError(
            f"the model's context and cache hold {llm.engine.longest} tokens, the bench takes {longest}",
            "Take a model with a longer context, or free some memory",
        )


def _path(llm: LLM) -> str:
    """Return what computes the steps."""
    if not isinstance(llm.engine, Engine):
        return "transformers"
    return str(getattr(llm.engine.runner, "path", "reference"))
