"""Integer products: weights stay in their codes, inputs are rounded to 8 bits, and whole numbers are multiplied.

Idea
----
One token needs every weight once, so a model writes as fast as its weights can be read. Plain engines decode a compressed
model to floats when they load it, and read four times the bytes ever after. Here the codes themselves are packed in the
order in which a product reads them and never decoded to memory: a line of 64 bytes is unpacked in registers, for all
rows of a step at once. The inputs are rounded to int8, a group of them at a time, so that the processor's products of
bytes do the work and only one product of floats is left for each group.

Formula
-------
``x (in)`` an input row, ``c (out, in)`` codes, ``s (out, groups)`` their scales, ``z`` the zero points, ``m`` the least
values where the grid has those, ``g`` a group of inputs that share a scale::

    a_g = max |x_g| / 127,   u_g = round(x_g / a_g)                         (1)
    n_og = sum_i u_gi (c_ogi - z_og)            whole numbers, exact         (2)
    y_o = sum_g n_og (s_og a_g) + m_og (a_g sum_i u_gi)      first group to last   (3)

When to use it
--------------
Nobody has to ask: the native step computes so whatever ``frugal run`` has stored on an integer grid, and GGUF files in
Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 (``frugal generate``, ``frugal chat``, ``frugallm.LLM``). Compress to 4 bits in groups to
gain most, and give the head, which is read for every token as well, 8 bits with ``embedding``.

Cost
----
Once, repacking while the model is loaded. A line of weights is unpacked once for up to 12 rows. Memory: codes and scales,
and a byte for each input of the rows under way. What rounding inputs costs in quality is part of the claim; a large
input spoils its own group only.

Differences from the paper
--------------------------
The paper is nearest among those that run large models on little hardware: weights in 4 bits with a scale for each group,
kernels for each of the processor's instruction sets, and a step made of few native calls. Its authors choose among
several types for the products; here they are always of int8, and their order of summation is fixed, so that a result
does not depend on threads, on rows beside it or on the instruction set. Rounding weights is no part of this method: any
step of a recipe does that. What the survey also counts here, keeping weights on disk or on several devices (FlexGen),
and skipping those that a token hardly needs (Deja Vu), is not done.

References
----------
Shen, Chang, Dong, Luo, Meng: Efficient LLM Inference on CPUs, NeurIPS 2023 workshop on Efficient Natural Language and
Speech Processing, https://arxiv.org/abs/2311.00502; code https://github.com/intel/neural-speed. Blocks with minima, as in
Q4_1: https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from frugallm.inference.contract import InferenceMethod
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from frugallm.engine.llm import LLM
    from frugallm.evaluate.bench import Bench

#: Perplexity that rounding inputs may cost, as a share: the engine's target for its path.
PERPLEXITY_SHARE = 0.01
#: Share of the floats' memory that packed weights may take.
MEMORY_SHARE = 0.5
#: Longest piece of held-out text that is judged at once, in tokens.
WINDOW = 512
PROMPT, ANSWER, ROUNDS = 64, 48, 5


class IntegerProducts(InferenceMethod):
    """Products of whole numbers on packed codes."""

    card: ClassVar[Card] = Card(
        title="Integer products on packed weights",
        summary="weights stay in their codes and are read once a step; inputs are rounded to int8 in the weights' groups",
        paper="Efficient LLM Inference on CPUs",
        authors="Shen, Chang, Dong, Luo, Meng",
        year=2023,
        venue="NeurIPS ENLSP workshop",
        arxiv="2311.00502",
        code="https://github.com/intel/neural-speed",
        row="s-inference",
        baseline="transformers with the same weights in the processor's fastest float type",
        claim="Stored in 4 bits, a model's slowest answer comes faster than the fastest of plain transformers with the same "
        "weights in floats, from less than half of the memory, and rounded inputs cost less than 1 % of perplexity.",
    )
    stored_as: ClassVar[tuple[str, ...]] = ("rtn", "embedding")
    tolerance: ClassVar[float] = 5e-3

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare the engine on codes with transformers on what they stand for: tokens/s, bytes, cost of rounded inputs."""
        import torch

        from frugallm.engine.llm import LLM
        from frugallm.engine.speed import Sizes, Trial
        from frugallm.evaluate.bench import compress_for_evaluation
        from frugallm.evaluate.precision import fast_dtype
        from frugallm.formats.decoded import Decoded
        from frugallm.inference.measures import in_turn, plain_pace
        from frugallm.recipe import Recipe

        cls.check_claim(bench)
        steps = Recipe.parse(cls.stored_as).steps
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "stored"
            plain = compress_for_evaluation(bench.checkpoint, steps, bench.calibration, out, in_memory=True)
            packed = LLM(Decoded(out), cache_tokens=2 * WINDOW)
        cost = cost_of_rounding(packed, plain, bench.windows)
        plain.to(fast_dtype())
        floats = LLM(plain, packed.tokenizer, cache_tokens=2 * WINDOW)
        sizes = Sizes(prompt=PROMPT, answer=ANSWER)
        pace = in_turn(
            {
                "packed": Trial(packed, sizes).decode,
                "transformers": partial(plain_pace, plain, bench.windows[0, :PROMPT], ANSWER),
                "engine on floats": Trial(floats, sizes).decode,
            },
            ROUNDS,
        )
        size = {
            "packed": packed.engine.runner.decoder.nbytes,  # type: ignore[attr-defined]
            "transformers": sum(p.nbytes for p in plain.parameters()),
        }
        return verdict(
            bench, pace, size, cost, {"float type": str(fast_dtype()), "threads": torch.get_num_threads()}
        )


def cost_of_rounding(packed: LLM, plain: PreTrainedModel, windows: Tensor) -> dict[str, float]:
    """Compare the engine, which rounds inputs, with the plain float32 model, which has the same weights and does not.

    Parameters
    ----------
    windows
        Held-out token ids ``(windows, length)``; long ones are cut.

    Returns
    -------
    dict
        Mean ``kl`` from the plain model to the engine in nats/token, and the engine's ``perplexity`` over the plain one's.
    """
    from frugallm.evaluate.predictions import Predictions, compare_window
    from frugallm.inference.measures import RunnerPredictions

    engine, exact = RunnerPredictions(packed.engine.runner), Predictions(plain)  # type: ignore[attr-defined]  # native: an Engine
    length = min(WINDOW, windows.shape[1])
    found = []
    for piece in windows[:, : windows.shape[1] // length * length].reshape(-1, length):
        logits = exact.logits(exact.states(piece))  # computed once; the engine's states are logits too
        loss, kl, _ = compare_window(engine, engine.states(piece), piece, engine, logits)
        found.append((kl, loss - compare_window(engine, logits, piece)[0]))
    kls, more = zip(*found, strict=True)
    return {"kl": statistics.fmean(kls), "perplexity": math.exp(statistics.fmean(more))}


def verdict(
    bench: Bench,
    pace: dict[str, list[float]],
    size: dict[str, int],
    cost: dict[str, float],
    details: dict[str, Any],
) -> Claim:
    """Return the claim from the arms' tokens/s, the bytes of their weights and what rounding inputs costs."""
    middle = {name: statistics.median(each) for name, each in pace.items()}
    share = size["packed"] / size["transformers"]
    failed = {
        "one of its runs is not faster": min(pace["packed"]) <= max(pace["transformers"]),
        f"its weights take {share:.2f} of the memory": share >= MEMORY_SHARE,
        f"rounded inputs take perplexity times {cost['perplexity']:.4f}": not cost["perplexity"]
        < 1 + PERPLEXITY_SHARE,
    }
    return Claim(
        metric="tokens/s, one answer",
        value=middle["packed"],
        baseline="transformers, same weights",
        baseline_value=middle["transformers"],
        better="higher",
        passed=not any(failed.values()),
        model=bench.model_name,
        reason=", ".join(reason for reason, true in failed.items() if true),
        details={
            "tokens/s": pace,
            "times faster": {name: middle["packed"] / each for name, each in middle.items()},
            "bytes of weights": size,
            "rounded inputs": cost,
            **details,
        },
    )
