"""The reference runner: the blocks of the plain ``transformers`` model over a paged cache, one token at a time.

Torch's products and vectorised loops give a row another last bit when other rows are computed beside it. Here every
module sees one token, in memory of its own, so a token's values follow from its sequence alone. That costs a pass
over a block's weights per token; what is fast is measured against this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frugallm.engine.runner import BLOCK_SIZE
from frugallm.errors import ModelError
from frugallm.models.family import FAMILIES, Heads

#: Rotary positions whose frequencies follow from a token's own position.
FIXED_ROTARY = {"default", "linear", "llama3", "yarn"}


def why_not(config: Any) -> str:
    """Return why the engine cannot compute a model of this configuration, or nothing.

    It knows decoders that take rotary values from the model and hand keys and values to a cache.
    """
    bases = {kind: family.base for family in FAMILIES for kind in family.model_types}
    if bases.get(config.model_type) != "model" or config.model_type == "opt":
        return f"the engine does not know the architecture '{config.model_type}'"
    kinds = {str(kind) for kind in _rotary_kinds(getattr(config, "rope_parameters", None) or {})}
    if kinds - FIXED_ROTARY:
        return (
            f"rotary positions of type '{sorted(kinds - FIXED_ROTARY)[0]}' change with the length of a text"
        )
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention looks ahead"
    return ""


def _rotary_kinds(parameters: dict[str, Any]) -> list[str]:
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [kind for part in parameters.values() if isinstance(part, dict) for kind in _rotary_kinds(part)]


def window_of(config: Any, layer: int) -> int | None:
    """Return how many positions, its own included, a token of this layer sees; ``None``: all up to it."""
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


class ReferenceRunner:
    """A :class:`~frugallm.engine.runner.Runner` made of a loaded ``transformers`` model.

    Parameters
    ----------
    model
        A Llama-like model as :func:`frugallm.load` returns it, in float32.
    blocks
        Blocks of the cache; each holds keys and values of ``BLOCK_SIZE`` tokens in float32.

    Raises
    ------
    ModelError
        If the architecture is unknown here.
    """

    block_size = BLOCK_SIZE

    def __init__(self, model: Any, blocks: int) -> None:
        config = model.config
        if reason := why_not(config):
            raise ModelError(f"{reason[0].upper()}{reason[1:]}", "Run it through transformers")
        model.set_attn_implementation("eager")  # one kernel whatever the length
        self.model, self.config = model, config
        heads = Heads.of(config)
        shape = (config.num_hidden_layers, blocks, BLOCK_SIZE, heads.values, heads.width)
        self._keys, self._values = torch.zeros(shape), torch.zeros(shape)
        self._types = getattr(config, "layer_types", None) or ["full_attention"] * shape[0]
        self._per_type = config.model_type == "gemma3_text"  # other rotary values in sliding layers

    @torch.inference_mode()
    def step(
        self, tokens: Tensor, positions: Tensor, starts: Tensor, tables: Tensor, logits_rows: Tensor
    ) -> Tensor:
        """Compute one step; see :class:`~frugallm.engine.runner.Runner`."""
        base = self.model.model
        where = positions.long().view(-1, 1, 1)
        hidden = [base.embed_tokens(token.view(1, 1)) for token in tokens.long()]
        rotary = [self._rotary(row, place) for row, place in zip(hidden, where)]
        counts = (starts[1:] - starts[:-1]).long()
        owners = torch.repeat_interleave(torch.arange(len(counts)), counts).tolist()
        rows = [_Row(self, tables[s].long(), int(p)) for s, p in zip(owners, positions)]
        # All tokens pass a layer before the next one: its weights stay in the processor's cache.
        for index, layer in enumerate(base.layers[: self.config.num_hidden_layers]):
            kind = self._types[index]
            for i, row in enumerate(rows):
                hidden[i] = layer(
                    hidden[i],
                    attention_mask=None,
                    position_ids=where[i],
                    past_key_values=row,
                    position_embeddings=rotary[i][kind],
                )
        return self._logits([hidden[i] for i in logits_rows.tolist()])

    def copy_block(self, source: int, target: int) -> None:
        """Copy keys and values of a block, all layers."""
        for cache in (self._keys, self._values):
            cache[:, target] = cache[:, source]

    def _rotary(self, row: Tensor, place: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        rotary = self.model.model.rotary_emb
        if self._per_type:
            return {kind: rotary(row, place, kind) for kind in set(self._types)}
        return dict.fromkeys(self._types, rotary(row, place))

    def _logits(self, rows: list[Tensor]) -> Tensor:
        if not rows:
            return torch.empty(0, self.config.vocab_size)
        logits = torch.cat([self.model.lm_head(self.model.model.norm(row))[0] for row in rows]).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


class _Row:
    """What a block takes for its cache: where one token puts its keys and values, and what it attends to."""

    is_compileable = False

    def __init__(self, runner: ReferenceRunner, table: Tensor, position: int) -> None:
        self._runner, self._position = runner, position
        self._table = table[: position // BLOCK_SIZE + 1]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store ``(1, heads, 1, width)`` and return all that the token sees, ``(1, heads, seen, width)``."""
        block, slot = int(self._table[-1]), self._position % BLOCK_SIZE
        window = window_of(self._runner.config, layer)
        first = 0 if window is None else max(0, self._position + 1 - window)
        seen = []
        for cache, new in ((self._runner._keys[layer], keys), (self._runner._values[layer], values)):
            cache[block, slot] = new[0, :, 0]
            held = cache[self._table].flatten(0, 1)[first : self._position + 1]
            seen.append(held.transpose(0, 1).contiguous().unsqueeze(0))
        return seen[0], seen[1]
