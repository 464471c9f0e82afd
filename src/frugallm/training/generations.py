"""Text that a model writes itself, to train on where no other text may be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Windows that are written at once.
BATCH = 32


@torch.inference_mode()
def generated(model: PreTrainedModel, windows: int, length: int, greedy: int, seed: int) -> Tensor:
    """Return windows that ``model`` writes, ``(windows, length)``.

    Each begins with a token of the vocabulary, none twice before all have been used; ``greedy`` tokens are the likeliest,
    the rest are drawn from the model's distribution. An end-of-text token does not end a window.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.config.get_text_config().vocab_size)
    rounds = -(-windows // vocabulary)
    order = torch.cat([torch.randperm(vocabulary, generator=generator) for _ in range(rounds)])
    parts = [_write(model, s, length, greedy, generator) for s in order[:windows].split(BATCH)]
    return torch.cat(parts).clone()


def _write(
    model: PreTrainedModel, starts: Tensor, length: int, greedy: int, generator: torch.Generator
) -> Tensor:
    ids = starts[:, None]  # (windows, 1)
    cache, newest = None, ids
    while ids.shape[1] < length:
        out = model(input_ids=newest, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if ids.shape[1] <= greedy:
            newest = logits.argmax(-1, keepdim=True)
        else:
            newest = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, newest], dim=1)
    return ids
