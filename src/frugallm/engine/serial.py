"""Models that the engine does not know: one answer after another through plain ``transformers``."""

from __future__ import annotations

from typing import Any

import torch

from frugallm.engine.blocks import Blocks
from frugallm.engine.core import Answering, Limits
from frugallm.engine.request import Sequence
from frugallm.engine.runner import BLOCK_SIZE


class SerialEngine(Answering):
    """Takes the same requests and chooses tokens the same way, with nothing batched and nothing shared.

    Parameters
    ----------
    network
        A ``transformers`` model that keeps its own cache.
    """

    def __init__(self, network: Any, tokenizer: Any, limits: Limits, ends: frozenset[int]) -> None:
        self._network, self._cache = network, None
        super().__init__(Blocks(-(-limits.context // BLOCK_SIZE), BLOCK_SIZE), tokenizer, limits, ends)

    @torch.inference_mode()
    def _work(self) -> None:
        sequence = self._current()
        new = torch.tensor([sequence.tokens[sequence.computed :]])
        result = self._network(input_ids=new, past_key_values=self._cache, use_cache=True)
        self._cache = result.past_key_values
        sequence.computed = len(sequence.tokens)
        self._choose(sequence, result.logits[0, -1].float().numpy())

    def _current(self) -> Sequence:
        """Return the answer that is being written, or begin the next one."""
        if not self.scheduler.running:
            following = self.scheduler.waiting.popleft()
            self.scheduler.waiting.extendleft(reversed(following.siblings))
            following.siblings = []
            self.scheduler.run(following)
            self._cache = None
        return self.scheduler.running[0]
