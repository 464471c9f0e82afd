"""Does the folder say what the model in memory says? Asked of a process that does not know FrugalLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from frugallm.errors import JobError
from frugallm.formats import outside

#: Largest relative squared error of logits in float32. Weights alone differ by the order of float sums only; rounded
#: activations may fall on the other side of a boundary and then differ by a step.
WEIGHT_ONLY_TOLERANCE = 1e-8
ROUNDED_INPUT_TOLERANCE = 1e-2


@dataclass
class Outside:
    """What the outside process reported about a folder."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def ask_outside(
    folder: Path,
    ids: Sequence[Sequence[int]],
    *,
    dtypes: dict[str, str | None],
    threads: int,
    prompt: str | None = None,
    answer_tokens: int = 48,
    speed: dict[str, Any] | None = None,
    eager: bool = False,
) -> Outside:
    """Load ``folder`` in a process of its own with plain transformers and return what it computes.

    Parameters
    ----------
    ids
        Token ids of fixed prompts, all of one length.
    dtypes
        Label to type to load in; ``None`` is the default way.
    speed
        ``{"ids", "decode", "runs"}``: measure prefill of these ids and decoding of that many tokens.
    eager
        Run what ``transformers`` would compile first as it is written: the values are the same.

    Raises
    ------
    JobError
        If the folder does not load there; the message carries the last line of what went wrong.
    """
    with tempfile.TemporaryDirectory(prefix="frugal-outside-") as scratch:
        request, reply = Path(scratch) / "request.json", Path(scratch) / "reply.safetensors"
        content = {
            "folder": str(folder.resolve()),
            "ids": [list(map(int, row)) for row in ids],
            "dtypes": dtypes,
            "threads": threads,
            "prompt": prompt,
            "answer_tokens": answer_tokens,
            "speed": speed,
        }
        request.write_text(json.dumps(content))
        # -I: neither the current folder nor PYTHONPATH is on the path, so nothing of the caller's leaks in.
        command = [sys.executable, "-I", str(outside.__file__), str(request), str(reply)]
        environment = {**os.environ, **({"TORCHDYNAMO_DISABLE": "1"} if eager else {})}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
            raise JobError(
                f"{folder}: plain transformers could not load or run it ({lines[-1] if lines else done.returncode})",
                "Run with --debug for the whole output" if lines else "",
            )
        with safe_open(reply, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return Outside({k: file.get_tensor(k) for k in file.keys()}, facts)  # noqa: SIM118


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return ``|a - b|^2 / |b|^2``."""
    return float((a - b).square().sum() / b.square().sum().clamp(min=1e-30))


def compare(
    model: nn.Module, blocks: Any, seen: Outside, ids: Tensor, *, tolerance: float, folder: Path
) -> dict[str, float]:
    """Hold what the outside process computed in float32 against ``model`` in memory.

    Returns
    -------
    dict
        ``float32_error``: relative squared error of the logits; ``default_kl``: mean KL divergence, in nats per token,
        of the folder loaded the default way.

    Raises
    ------
    JobError
        If they differ by more than ``tolerance``; it names the first block where they do.
    """
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(_keeper(outputs)) for b in blocks]
    with torch.inference_mode():
        logits = model(ids).logits.float()
    for hook in hooks:
        hook.remove()
    error = relative_error(seen.tensors["float32.logits"], logits)
    if not error <= tolerance:
        parts = [relative_error(seen.tensors[f"float32.block.{i}"], out) for i, out in enumerate(outputs)]
        first = next((i for i, e in enumerate(parts) if not e <= tolerance), None)
        where = "the head" if first is None else f"block {first}"
        raise JobError(
            f"{folder}: loaded without FrugalLM it computes something else from {where} on "
            f"(relative squared error {error:.1e}, allowed {tolerance:.0e})",
            "The folder was not finished; please report this with the recipe",
        )
    ours, theirs = logits.log_softmax(-1), seen.tensors["default.logits"].log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean()
    return {"float32_error": error, "default_kl": float(kl)}


def _keeper(outputs: list[Tensor]) -> Callable[..., None]:
    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).float())

    return keep
