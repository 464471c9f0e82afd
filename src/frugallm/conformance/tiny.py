"""A tiny model that has learned something, made on the spot: what claims are checked on in the tests.

Half a million parameters of the llama family, trained for half a minute on the embedded calibration text.
Large models have a few channels that are tens of times larger than the rest. A model as small as this one has
none, so they are planted after training without changing its function: gains of a few channels of every norm,
and a few rows of every up projection, are multiplied, and the columns that read them divided.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frugallm.compress.quantize import transforms

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from frugallm.evaluate.bench import Bench

NAME = "tiny"
SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TRAINING = {"seed": 0, "steps": 480, "windows": 8, "length": 128, "rate": 6e-3}
OUTLIERS = {"seed": 1, "channels": 3, "least": 20.0, "most": 40.0}
#: Windows of calibration and of held-out text.
CALIBRATION, HELD_OUT = 96, 48
#: More threads take longer for products this small, the more so where the machine has other work.
THREADS = 1


def tiny_model(cache: Path) -> Path:
    """Return the folder of the tiny model, trained now unless ``cache`` holds it already.

    Parameters
    ----------
    cache
        Folder that keeps the model between runs, under a name made from all that decides it.
    """
    from frugallm.text import open_text

    text = open_text(None, "calibrate")
    folder = cache / f"tiny-{_digest(text.digest)}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix="tiny-", dir=cache))
        tokenizer = train_tokenizer(text.documents)
        model = train(tokenizer, text.documents)
        plant_outliers(model)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        try:
            os.rename(draft, folder)
        except OSError:  # somebody else was faster
            shutil.rmtree(draft)
    return folder


def tiny_bench(cache: Path) -> Bench:
    """Return a bench on the tiny model, calibrated and judged on windows of the embedded texts."""
    from frugallm.evaluate.bench import Bench
    from frugallm.models import open_checkpoint
    from frugallm.text import calibration_windows, evaluation_windows, open_text
    from frugallm.training.bench import TrainingBench

    checkpoint = open_checkpoint(tiny_model(cache))
    checkpoint.name = NAME
    tokenizer, length = checkpoint.tokenizer, int(TRAINING["length"])
    calibration = calibration_windows(open_text(None, "calibrate"), tokenizer, CALIBRATION, length)
    windows = evaluation_windows(open_text(None, "evaluate"), tokenizer, HELD_OUT, length)
    return Bench(checkpoint, calibration, windows, dtype="fp32", training=TrainingBench("seconds"))


def _digest(text: str) -> str:
    """Return a name for all that decides the model: code, figures, text, version of torch."""
    code = [inspect.getsource(part) for part in (train_tokenizer, train, plant_outliers)]
    facts = [code, SHAPE, TRAINING, OUTLIERS, text, torch.__version__]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of ``SHAPE['vocab_size']`` tokens made from ``documents``."""
    from frugallm.training.students import train_tokenizer as bpe

    return bpe(documents, SHAPE["vocab_size"])


def train(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> LlamaForCausalLM:
    """Return a model trained with AdamW on windows at random places of the text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = torch.tensor(tokenizer("\n\n".join(documents), verbose=False)["input_ids"])
    steps, count, length = (int(TRAINING[key]) for key in ("steps", "windows", "length"))
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(TRAINING["seed"]))
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=TRAINING["rate"], betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, TRAINING["rate"], total_steps=steps, pct_start=0.1
        )
        for _ in range(steps):
            starts = torch.randint(len(ids) - length, (count,))
            batch = ids[starts[:, None] + torch.arange(length)]
            model(batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    torch.set_num_threads(threads)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def plant_outliers(model: Any) -> None:
    """Give every block a few channels as large as those of large models; its function stays the same."""
    generator = torch.Generator().manual_seed(int(OUTLIERS["seed"]))

    def scale(width: int) -> Tensor:
        grown = torch.ones(width)
        chosen = torch.randperm(width, generator=generator)[: int(OUTLIERS["channels"])]
        spread = torch.rand(len(chosen), generator=generator)
        grown[chosen] = OUTLIERS["least"] + (OUTLIERS["most"] - OUTLIERS["least"]) * spread
        return grown

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            grown = scale(norm.weight.shape[0])
            norm.weight *= grown
            for linear in readers:
                linear.weight.copy_(transforms.scale_columns(linear.weight, 1 / grown))
        grown = scale(mlp.up_proj.weight.shape[0])
        mlp.up_proj.weight.copy_(transforms.scale_rows(mlp.up_proj.weight, 1 / grown))
        mlp.down_proj.weight.copy_(transforms.scale_columns(mlp.down_proj.weight, 1 / grown))
