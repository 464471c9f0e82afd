"""What a model predicts at every position of a window, without ever holding all logits at once.

Logits are by far the largest thing in an evaluation (2048 positions x 49,152 tokens are 400 MB). Here the
decoder runs once over a window, and the head runs over its hidden states some positions at a time. The hidden
states are also what is kept of a reference: they are small, and its logits come from them again in a fraction
of a forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from frugallm.errors import ModelError
from frugallm.evaluate.precision import products_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 256
PROBE_TOKENS = 8


class HasLogits(Protocol):
    """What can be compared: states of a window, some rows at a time, become logits."""

    def logits(self, states: Tensor) -> Tensor:
        """Return float32 logits ``(positions, vocabulary)``."""
        ...


class Predictions:
    """The predictions of one model.

    Parameters
    ----------
    model
        A causal language model, best with float32 weights.
    products
        ``torch.bfloat16`` or ``torch.float32``, see :func:`frugallm.evaluate.precision.products_in`.

    Attributes
    ----------
    chunked
        Whether logits are ``head(hidden states)``, found out by trying. If the architecture does anything
        else with them (a soft cap, a scale), states are the whole logits of one window.
    """

    def __init__(self, model: PreTrainedModel, products: torch.dtype = torch.float32) -> None:
        self._model: Any = model.eval()
        self._head = model.get_output_embeddings()
        self._products = products
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.dtype = _dtype_name(model, products)
        self.chunked = self._head_is_all()

    @torch.inference_mode()
    def states(self, window: Tensor) -> Tensor:
        """Return hidden states ``(positions, width)`` of a window ``(positions,)``; logits if not chunked."""
        ids = window[None].to(self._model.device)
        with products_in(self._products):
            if self.chunked:
                return self._model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
            return self._model(input_ids=ids, use_cache=False).logits[0]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Return float32 logits ``(positions, vocabulary)`` for some rows of :meth:`states`."""
        with products_in(self._products):
            return (self._head(states) if self.chunked else states).float()

    def forget_decoder(self) -> None:
        """Let the decoder go; :meth:`logits` still works."""
        if self.chunked:
            self._model = None

    def _head_is_all(self) -> bool:
        decoder = self._model.get_decoder()
        if self._head is None or decoder is self._model:
            return False
        ids = torch.arange(PROBE_TOKENS, device=self._model.device)[None]
        with torch.inference_mode():
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
            whole = self._model(input_ids=ids, use_cache=False).logits
            return torch.allclose(self._head(states), whole, rtol=1e-4, atol=1e-4, equal_nan=True)


def _dtype_name(model: nn.Module, products: torch.dtype) -> str:
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    short = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
    if weights != torch.float32:
        return f"{short.get(weights, str(weights))} throughout"
    return "fp32" if products == torch.float32 else "fp32, products on bf16 units"


def compare_window(
    ours: HasLogits,
    states: Tensor,
    targets: Tensor,
    theirs: HasLogits | None = None,
    theirs_states: Tensor | None = None,
) -> tuple[float, float, float]:
    """Return mean negative log-likelihood, KL divergence and top-1 agreement over one window.

    Every position predicts the next one of the same window, in float32 log-softmax.

    Parameters
    ----------
    ours, states
        The model judged, and its states ``(positions, width)``.
    targets
        The window itself, ``(positions,)``.
    theirs, theirs_states
        The reference; KL is ``KL(theirs || ours)``.

    Returns
    -------
    tuple of float
        In nats/token, nats/token and as a share; the latter two are NaN without a reference.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    last = len(targets) - 1
    for start in range(0, last, CHUNK):
        rows = slice(start, min(start + CHUNK, last))
        wanted = targets[start + 1 : rows.stop + 1]
        log_p = ours.logits(states[rows]).log_softmax(-1)  # (rows, vocabulary)
        sums[0] -= log_p.gather(1, wanted[:, None].to(log_p.device)).double().sum().cpu()
        if theirs is not None and theirs_states is not None:
            sums[1:] += _agreement(theirs.logits(theirs_states[rows]), log_p)
    means = (sums / last).tolist()
    return (means[0], means[1], means[2]) if theirs is not None else (means[0], float("nan"), float("nan"))


def _agreement(reference: Tensor, log_p: Tensor) -> Tensor:
    """Return the sums of KL(reference || ours) and of equal top tokens over ``(rows, vocabulary)``."""
    if reference.shape != log_p.shape:
        raise ModelError(
            f"the models choose from {log_p.shape[-1]:,} and {reference.shape[-1]:,} tokens",
            "Compare models with the same vocabulary",
        )
    log_q = reference.log_softmax(-1)
    same = log_q.argmax(-1) == log_p.argmax(-1)
    # F.kl_div sums exp(log_q) * (log_q - log_p); tokens of probability zero add nothing.
    kl = nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return torch.stack([kl.double().sum(), same.double().sum()]).cpu()
