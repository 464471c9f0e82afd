"""What lies in a finished folder, held against what the job says it holds."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from frugallm.conformance.outcome import CheckFailed, ensure
from frugallm.conformance.trial import Run
from frugallm.formats.outside import decode_in
from frugallm.formats.stored import model_in_memory
from frugallm.formats.verify import ROUNDED_INPUT_TOLERANCE, WEIGHT_ONLY_TOLERANCE, relative_error


def file_bytes(run: Run) -> int:
    """Return the bytes of all tensors in the folder, headers not counted."""
    total = 0
    for path in run.folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (header,) = struct.unpack("<Q", file.read(8))
        total += path.stat().st_size - 8 - header
    return total


def in_memory_logits(run: Run, tokens: Tensor) -> Tensor:
    """Return the logits of the stored values, inputs rounded as the schemes say."""
    model = model_in_memory(run.place.stored(run.job))
    with torch.inference_mode():
        logits = model(tokens).logits.float()
    ensure(bool(logits.isfinite().all()), "the stored values give logits that are not finite")
    return logits


def reads_back_finite(run: Run, tokens: Tensor) -> None:
    """Where no other engine loads the result, it can at least be read back by us."""
    in_memory_logits(run, tokens)


def outside_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits of ``AutoModelForCausalLM`` on the folder; what it would compile runs as it is written."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        decode_in(model, torch.float32)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise CheckFailed(f"plain transformers does not load it ({error})") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        return model(tokens).logits.float()


def loads_outside_as_in_memory(run: Run, tokens: Tensor) -> None:
    """``AutoModelForCausalLM`` loads the folder to the logits of the stored values."""
    rounded = any(plan.scheme.activations is not None for plan in run.job.plan.linears.values())
    allowed = ROUNDED_INPUT_TOLERANCE if rounded else WEIGHT_ONLY_TOLERANCE
    apart = relative_error(outside_logits(run.folder, tokens), in_memory_logits(run, tokens))
    ensure(apart <= allowed, f"loaded by transformers it computes something else (squared error {apart:.1e})")
