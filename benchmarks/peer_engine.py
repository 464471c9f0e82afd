"""One engine on one model, in a process of its own: how soon its first token comes, and how fast it reads and writes.

Runs in the environment of the engine: ``frugal`` and ``transformers`` in ours, ``llama_cpp`` and ``openvino`` in their own,
which know nothing of FrugalLM. Reads a request (JSON: token ids of every prompt, and how much to write), writes a reply (JSON).
Prints ``{"event": …}`` lines on standard error, ``first_token`` among them. Every side gets the same ids, takes the
likeliest token, and stops at no end of text. Everything runs once on other ids before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Protocol

Ids = list[int]


def event(name: str, **more: Any) -> None:
    print(json.dumps({"event": name, **more}), file=sys.stderr, flush=True)


class Side(Protocol):
    """An engine with a model."""

    def write(self, prompts: list[Ids], tokens: int) -> list[float]:
        """Answer prompts, all of one length, together; return the clock at every token of the first, or at the end."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what is to be known about how it ran."""
        ...


class Frugal:
    """Our engine."""

    def __init__(self, model: str, threads: int, longest: int, together: int) -> None:
        import torch

        from frugallm.engine.llm import LLM
        from frugallm.engine.sampling import SamplingParams

        torch.set_num_threads(threads)
        # Some blocks more, so that nobody is preempted for want of a last one.
        self._llm = LLM(model, cache_tokens=max(longest, together) + 256)
        self._params = SamplingParams

    def write(self, prompts: list[Ids], tokens: int) -> list[float]:
        """See :class:`Side`."""
        params = self._params(temperature=0, max_tokens=tokens, ignore_eos=True)
        if len(prompts) == 1:
            return [time.perf_counter() for _ in self._llm.stream(prompts[0], params)]
        self._llm.generate(prompts, params)
        return [time.perf_counter()]

    def facts(self) -> dict[str, Any]:
        """See :class:`Side`."""
        from frugallm.engine.speed import weights_bytes

        runner = self._llm.engine.runner
        if not hasattr(runner, "decoder"):
            raise SystemExit(
                f"our side must run on native kernels here: {self._llm.note or 'they are not built'}"
            )
        return {
            "path": runner.path,
            "weights_bytes": weights_bytes(runner.decoder),
            "cache_bytes": runner.cache_bytes,
        }


class LlamaCpp:
    """llama.cpp through its batch interface: eight streams are one batch a step, as its server does it."""

    def __init__(self, model: str, threads: int, longest: int, together: int) -> None:
        from llama_cpp import llama_cpp as llama

        self._llama, self._threads, self._longest, self._together = llama, threads, longest, together
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._contexts: dict[int, Any] = {}

    def write(self, prompts: list[Ids], tokens: int) -> list[float]:
        """See :class:`Side`."""
        llama, context = self._llama, self._context(len(prompts))
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        times, last = [], prompts
        for step in range(tokens):
            start = 0 if step == 0 else len(prompts[0]) + step - 1
            last = [[token] for token in self._step(context, last, start)]
            times.append(time.perf_counter())
        return times

    def facts(self) -> dict[str, Any]:
        """See :class:`Side`."""
        return {"streams": "one batch a step"}

    def _context(self, streams: int) -> Any:
        if streams not in self._contexts:
            params = self._llama.llama_context_default_params()
            params.n_seq_max = streams
            params.n_ctx = self._longest if streams == 1 else self._together
            params.n_batch = max(512, params.n_ctx)
            params.n_threads = params.n_threads_batch = self._threads
            self._contexts[streams] = self._llama.llama_init_from_model(self._model, params)
            if not self._contexts[streams]:
                raise SystemExit("llama.cpp cannot make a context")
        return self._contexts[streams]

    def _step(self, context: Any, new: list[Ids], start: int) -> Ids:
        """Compute the new tokens of all streams from position ``start`` on; return the likeliest token of each."""
        import numpy as np

        llama, count = self._llama, sum(map(len, new))
        batch = llama.llama_batch_init(count, 0, 1)
        place, rows = 0, []
        for stream, ids in enumerate(new):
            for offset, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, start + offset
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, stream
                batch.logits[place] = offset == len(ids) - 1
                place += 1
            rows.append(place - 1)
        batch.n_tokens = count
        status = llama.llama_decode(context, batch)
        llama.llama_batch_free(batch)
        if status:
            raise SystemExit(f"llama_decode returned {status}")
        found = (llama.llama_get_logits_ith(context, row) for row in rows)
        return [int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax()) for logits in found]


class OpenVINO:
    """OpenVINO GenAI with paged attention and continuous batching, as its own pipeline for one prompt has it underneath."""

    def __init__(self, model: str, threads: int, longest: int, together: int) -> None:
        import openvino_genai

        self._genai = openvino_genai
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, openvino_genai.SchedulerConfig(), "CPU", {"INFERENCE_NUM_THREADS": threads}
        )

    def write(self, prompts: list[Ids], tokens: int) -> list[float]:
        """See :class:`Side`."""
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        config.apply_chat_template = False
        given = [openvino.Tensor(np.asarray([ids], dtype=np.int64)) for ids in prompts]
        if len(prompts) > 1:
            self._pipeline.generate(given, [config] * len(given))
            return [time.perf_counter()]
        times: list[float] = []
        self._pipeline.generate(given, [config], clock(self._genai, times))
        return times

    def facts(self) -> dict[str, Any]:
        """See :class:`Side`."""
        return {"streams": "continuous batching"}


def clock(genai: Any, times: list[float]) -> Any:
    """Return a streamer of OpenVINO GenAI that notes when tokens come."""

    class Clock(genai.StreamerBase):
        def write(self, token: Any) -> Any:
            times.extend([time.perf_counter()] * (1 if isinstance(token, int) else len(token)))
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Clock()


class Transformers:
    """Plain transformers in bf16, with its own cache; a loop that does nothing but take the likeliest token."""

    def __init__(self, model: str, threads: int, longest: int, together: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def write(self, prompts: list[Ids], tokens: int) -> list[float]:
        """See :class:`Side`."""
        torch, cache, times = self._torch, None, []
        new = torch.tensor(prompts)
        with torch.inference_mode():
            for _ in range(tokens):
                out = self._model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, new = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                new.tolist()
                times.append(time.perf_counter())
        return times

    def facts(self) -> dict[str, Any]:
        """See :class:`Side`."""
        return {"streams": "one batch"}


ENGINES: dict[str, Any] = {
    "frugal": Frugal,
    "llama_cpp": LlamaCpp,
    "openvino": OpenVINO,
    "transformers": Transformers,
}


def first_after(side: Side, prompt: Ids) -> float:
    """Return the seconds until the first token of an answer."""
    begin = time.perf_counter()
    return side.write([prompt], 1)[0] - begin


def pace(side: Side, prompt: Ids, tokens: int) -> float:
    """Return the tokens a second of one answer behind its first."""
    times = side.write([prompt], tokens + 1)
    if len(times) != tokens + 1:
        raise SystemExit(f"{len(times)} tokens came, not {tokens + 1}")
    return tokens / (times[-1] - times[0])


def rates(side: Side, ids: dict[str, Any], answer: int) -> dict[str, float]:
    """Return the rates of a prompt that is read (the median), of one answer and of a batch, in tokens a second."""
    found = {
        "prefill": statistics.median(len(prompt) / first_after(side, prompt) for prompt in ids["prefill"])
    }
    found["decode"] = pace(side, ids["decode"], answer)
    begin = time.perf_counter()
    end = side.write(ids["batch"], answer)[-1]
    return found | {"batch": len(ids["batch"]) * answer / (end - begin)}


def work(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """Do what the request asks for; return what was found."""
    if "context" in request:
        pace(side, request["context"][0], request["answer"])
        return {"context": {len(ids): pace(side, ids, request["answer"]) for ids in request["context"]}}
    rates(side, request["warm"], request["answer"])
    found: dict[str, Any] = rates(side, request["timed"], request["answer"])
    if "shared" in request:
        found["alone_seconds"] = first_after(side, request["shared"]["alone"])
        first_after(side, request["shared"]["before"])
        found["shared_seconds"] = first_after(side, request["shared"]["sharing"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=sorted(ENGINES), required=True)
    parser.add_argument("--model", required=True, help="a folder, or a GGUF file")
    parser.add_argument("--request", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    request = json.loads(args.request.read_text())
    side = ENGINES[args.engine](args.model, args.threads, request["longest"], request["together"])
    side.write([request["first"]], 1)
    event("first_token")
    facts = side.facts()
    args.out.write_text(json.dumps({**work(side, request), "facts": facts}))


if __name__ == "__main__":
    main()
