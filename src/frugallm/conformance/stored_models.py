"""What lies in a finished folder, held against what the job says it holds."""

from __future__ import annotations

import math
import shutil
import struct
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from frugallm.conformance.outcome import CheckFailed, ensure
from frugallm.conformance.trial import Run
from frugallm.errors import FrugalError
from frugallm.formats.compressed_tensors import container
from frugallm.formats.engines import loads_in_transformers
from frugallm.formats.extras import LEAVES
from frugallm.formats.outside import decode_in
from frugallm.formats.quantized_tensor import LinearScheme
from frugallm.formats.stored import model_in_memory
from frugallm.formats.verify import ROUNDED_INPUT_TOLERANCE, WEIGHT_ONLY_TOLERANCE, relative_error
from frugallm.models.open import load


def file_bytes(run: Run) -> int:
    """Return the bytes of all tensors in the folder, headers not counted."""
    total = 0
    for path in run.folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (header,) = struct.unpack("<Q", file.read(8))
        total += path.stat().st_size - 8 - header
    return total


def claimed_bytes(run: Run) -> int:
    """Return the bytes that the schemes of a run claim for all of its tensors; extras claim what they take."""
    plan, checkpoint, total = run.job.plan, run.job.checkpoint, 0
    for name in checkpoint.names():
        path, _, leaf = name.rpartition(".")
        linear, table = plan.linears.get(path), plan.tables.get(path)
        if leaf == "weight" and linear is not None:
            total += container_bytes(linear.scheme, *checkpoint.shape(name))
        elif leaf == "weight" and table is not None:
            scheme, tied = LinearScheme(weights=table.scheme), bool(checkpoint.config.tie_word_embeddings)
            total += container_bytes(scheme, *checkpoint.shape(name), table=True, tied=tied)
        else:
            total += math.prod(checkpoint.shape(name)) * run.job.stored.itemsize
    return total + sum(t.nbytes for name, t in run.tensors().items() if name.rpartition(".")[2] in LEAVES)


def container_bytes(
    scheme: LinearScheme, rows: int, width: int, *, table: bool = False, tied: bool = False
) -> int:
    """Return the bytes that a linear or table ``(rows, width)`` claims: its weights', and what their container adds."""
    weights, inputs = scheme.weights, scheme.activations
    total = weights.stored_bytes(rows, width) + (4 if weights.two_scales else 0)
    packed = container(scheme, table=table) == "pack-quantized"
    if packed:
        total += 16  # the shape
    elif tied:  # the scale has a second name
        total += (
            rows * (width // weights.columns_per_scale(width)) * getattr(torch, weights.scale_dtype).itemsize
        )
    if inputs is not None and inputs.clusters is not None:
        total += width + 6 * inputs.clusters
    elif scheme.static_inputs:
        total += 4
    if inputs is not None and inputs.reassembled:
        total += (4 + 2) * width
    return total


def in_memory_logits(run: Run, tokens: Tensor) -> Tensor:
    """Return the logits of the stored values, inputs rounded as the schemes say."""
    model = model_in_memory(run.place.stored(run.job))
    with torch.inference_mode():
        logits = model(tokens).logits.float()
    ensure(bool(logits.isfinite().all()), "the stored values give logits that are not finite")
    return logits


def here_logits(run: Run, tokens: Tensor) -> Tensor:
    """Return the logits of :func:`frugallm.load` on a copy of the folder that has what the models on trial have not."""
    with tempfile.TemporaryDirectory(prefix="frugal-loaded-") as scratch:
        folder = Path(scratch) / "result"
        shutil.copytree(run.folder, folder)
        (folder / "manifest.json").write_text("{}")
        words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        try:
            model, _ = load(folder)
        except FrugalError as error:
            raise CheckFailed(f"frugallm.load does not read it ({error})") from error
    with torch.inference_mode():
        return model(tokens).logits.float()


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
    _ensure_equal(run, tokens, outside_logits(run.folder, tokens), "transformers")


def loads_where_the_table_says(run: Run, tokens: Tensor) -> None:
    """Plain ``transformers`` loads the folder to the logits of the stored values, or where it does not, we do."""
    if loads_in_transformers(run.job.plan):
        loads_outside_as_in_memory(run, tokens)
    else:
        _ensure_equal(run, tokens, here_logits(run, tokens), "frugallm.load")


def _ensure_equal(run: Run, tokens: Tensor, logits: Tensor, loader: str) -> None:
    rounded = any(plan.scheme.activations is not None for plan in run.job.plan.linears.values())
    allowed = ROUNDED_INPUT_TOLERANCE if rounded else WEIGHT_ONLY_TOLERANCE
    apart = relative_error(logits, in_memory_logits(run, tokens))
    ensure(apart <= allowed, f"loaded by {loader} it computes something else (squared error {apart:.1e})")
