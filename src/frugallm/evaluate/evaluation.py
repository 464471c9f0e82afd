"""Evaluate models: perplexity, KL divergence and top-1 agreement, with intervals and a verdict.

How it is measured, for every model alike: the documents of a text are concatenated and tokenized; windows of
2048 tokens are cut from the start without overlap; each begins with the BOS token if and only if the
tokenizer adds one (:func:`frugallm.text.leading_bos`); within a window every position predicts the next;
log-softmax is float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from frugallm.errors import DataError, ModelError
from frugallm.evaluate.bootstrap import Measure, Verdict, measure, verdict
from frugallm.evaluate.machine import VERSIONS as VERSIONS
from frugallm.evaluate.machine import versions
from frugallm.evaluate.precision import Precision, product_dtype
from frugallm.evaluate.predictions import Predictions, compare_window
from frugallm.progress import Progress
from frugallm.text import Text, evaluation_windows, leading_bos, open_text

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from frugallm.models.checkpoint import Checkpoint

    Source = str | Path | PreTrainedModel | Checkpoint  # what frugallm.models.load takes


class TextFacts(BaseModel):
    """Which text was used: name, sha256 of its documents, tokens used, whether figures are smoke figures."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    smoke: bool = False
    tokens: int = 0

    @classmethod
    def of(cls, text: Text, windows: Tensor) -> TextFacts:
        """Return the facts of a text of which ``windows (windows, length)`` were used."""
        return cls(name=text.name, digest=text.digest, smoke=text.smoke, tokens=windows.numel())


class Evaluation(BaseModel):
    """The measured quality of one model.

    Attributes
    ----------
    model, against
        Names of the model and of the reference (``None``: there was none).
    text, windows, window_length, bos
        What it was measured on; ``bos`` is whether every window begins with the BOS token.
    perplexity
        exp of the mean negative log-likelihood.
    kl
        Mean over tokens of KL(reference || model), in nats/token.
    top1
        Share of positions at which both find the same token likeliest.
    perplexity_ratio
        Perplexity over the reference's; the interval is paired over windows.
    verdict
        See :func:`frugallm.evaluate.bootstrap.verdict`; ``None`` where nothing can be said.
    nll_per_window, kl_per_window, top1_per_window, reference_nll_per_window
        Means of each window, from which all of the above follows.
    dtype
        What products ran in.
    seconds
        Wall time of this model's forward passes and comparisons.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    model: str
    against: str | None = None
    text: TextFacts | None = None
    windows: int
    window_length: int
    bos: bool
    seed: int = 0
    perplexity: Measure
    kl: Measure | None = None
    top1: Measure | None = None
    perplexity_ratio: Measure | None = None
    verdict: Verdict | None = None
    note: str = ""
    nll_per_window: list[float]
    kl_per_window: list[float] = []
    top1_per_window: list[float] = []
    reference_nll_per_window: list[float] = []
    dtype: str
    seconds: float
    versions: dict[str, str] = {}


def evaluate(
    model: Source,
    against: Source | None = None,
    text: str | Path | Text | None = None,
    windows: int | None = 8,
    window_length: int = 2048,
    seed: int = 0,
    dtype: Precision = "auto",
    progress: Progress | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Evaluation:
    """Measure a model's perplexity, and its divergence from another if ``against`` is given.

    Parameters
    ----------
    model, against
        Anything that :func:`frugallm.models.load` takes, or loaded models (which need ``tokenizer``).
    text
        What :func:`frugallm.text.open_text` takes; ``None`` is the embedded text (smoke figures).
    windows, window_length
        How many windows from the start of the text (``None``: all) of how many tokens; a model with a shorter
        context gets windows of that length.
    seed
        Of the bootstrap.
    dtype
        Products in ``"bf16"`` or ``"fp32"``; ``"auto"`` takes bf16 where the processor is fast at it.
    progress
        Where to report ``window`` events.
    tokenizer
        Of loaded models; of the others it is read with them.

    Examples
    --------
    >>> from frugallm.evaluate import evaluate
    >>> evaluate("smollm2-135m", text="notes.txt").perplexity.value  # doctest: +SKIP
    """
    progress = progress or Progress()
    product_dtype(dtype)  # a wrong name is refused before anything is loaded
    progress.event("stage", text=f"load {_name(model)}")
    loaded, own = _load(model, tokenizer)
    tokenizer = _tokenizer(model, tokenizer or own)
    opened = text if isinstance(text, Text) else open_text(text, "evaluate", tokenizer)
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or window_length
    ids = evaluation_windows(opened, tokenizer, windows, min(window_length, context))
    name = _name(model)
    results = evaluate_all(
        {name: loaded},
        against,
        ids,
        text=TextFacts.of(opened, ids),
        bos=leading_bos(tokenizer) is not None,
        tokenizer=tokenizer,
        seed=seed,
        dtype=dtype,
        progress=progress,
    )
    return results[name]


def evaluate_all(
    candidates: Mapping[str, Source],
    reference: Source | Reference | None,
    windows: Tensor,
    *,
    text: TextFacts | None = None,
    bos: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    dtype: Precision = "auto",
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Measure several models on the same windows, against the same reference.

    The reference runs once, also if it is a candidate itself. Of it only the head and the hidden states are
    kept, and of the candidates one is in memory at a time.

    Parameters
    ----------
    candidates
        Name → anything that :func:`frugallm.models.load` takes, or a loaded model.
    reference
        The same; or a :class:`Reference` on the same windows, kept from before; or ``None``.
    windows
        Token ids, ``(windows, length)``, from :func:`frugallm.text.evaluation_windows`.
    text, bos
        Recorded in the results.
    tokenizer
        The one that made the windows. A model that tokenizes otherwise is refused.
    seed, dtype, progress
        See :func:`evaluate`.
    """
    progress = progress or Progress()
    products = product_dtype(dtype)
    base = None
    if isinstance(reference, Reference):
        base = reference
    elif reference is not None:
        base = Reference(reference, windows, tokenizer=tokenizer, dtype=dtype, progress=progress)
    results = {}
    for name, candidate in candidates.items():
        progress.event("stage", text=f"evaluate {name}")
        start = time.perf_counter()
        if base is not None and candidate is reference:
            predictions, rows = base.predictions, [(nll, 0.0, 1.0) for nll in base.nll]
        else:
            predictions = _open(candidate, products, tokenizer)
            rows = _compare(predictions, base, windows, progress)
        facts = {
            "model": name,
            "text": text,
            "bos": bos,
            "dtype": predictions.dtype,
            "window_length": windows.shape[1],
        }
        seconds = time.perf_counter() - start
        results[name] = _evaluation(rows, base, predictions.vocabulary, seed, facts | {"seconds": seconds})
        del predictions  # before the next is loaded
    return results


class Reference:
    """What is kept of a reference: its hidden states of all windows, computed once, and its head.

    Where an architecture's logits are more than its head, the model is kept and runs again for every
    candidate.
    """

    def __init__(
        self,
        model: Source,
        windows: Tensor,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: Precision = "auto",
        progress: Progress | None = None,
    ) -> None:
        progress = progress or Progress()
        progress.event("stage", text=f"{_name(model)}: the reference")
        self.name = _name(model)
        self.predictions = _open(model, product_dtype(dtype), tokenizer)
        self._windows = windows
        self._kept: list[Tensor] = []
        self.nll: list[float] = []
        for index, window in enumerate(windows):
            states = self.predictions.states(window)
            self.nll.append(compare_window(self.predictions, states, window)[0])
            if self.predictions.chunked:
                self._kept.append(states)
            progress.event("window", index=index + 1, of=len(windows))
        self.predictions.forget_decoder()

    def states(self, index: int) -> Tensor:
        """Return the states of window ``index`` for the predictions' :meth:`~Predictions.logits`."""
        return self._kept[index] if self._kept else self.predictions.states(self._windows[index])


def _compare(
    ours: Predictions, base: Reference | None, windows: Tensor, progress: Progress
) -> list[tuple[float, float, float]]:
    rows = []
    for index, window in enumerate(windows):
        states = ours.states(window)
        theirs = (base.predictions, base.states(index)) if base else (None, None)
        rows.append(compare_window(ours, states, window, *theirs))
        progress.event("window", index=index + 1, of=len(windows))
    return rows


def _evaluation(
    rows: list[tuple[float, float, float]],
    base: Reference | None,
    vocabulary: int,
    seed: int,
    facts: dict[str, Any],
) -> Evaluation:
    """Draw the figures of one model from its windows."""
    nll, kl, top1 = (list(column) for column in zip(*rows, strict=True))
    perplexity = measure(nll, "", seed, torch.exp)
    against: dict[str, Any] = {}
    ratio = None
    if base is not None:
        ratio = measure(torch.tensor(nll).double() - torch.tensor(base.nll).double(), "", seed, torch.exp)
        against = {
            "against": base.name,
            "kl": measure(kl, "nats/token", seed),
            "top1": measure(top1, "share", seed),
            "perplexity_ratio": ratio,
            "kl_per_window": kl,
            "top1_per_window": top1,
            "reference_nll_per_window": base.nll,
        }
    base_perplexity = math.exp(sum(base.nll) / len(base.nll)) if base else None
    return Evaluation(
        windows=len(nll),
        seed=seed,
        perplexity=perplexity,
        verdict=verdict(perplexity.value, vocabulary, base_perplexity, ratio),
        note="one window: intervals are unknown" if len(nll) == 1 else "",
        nll_per_window=nll,
        versions=versions(),
        **against,
        **facts,
    )


def _open(model: Source, products: torch.dtype, tokenizer: PreTrainedTokenizerBase | None) -> Predictions:
    loaded, own = _load(model, tokenizer)
    if tokenizer is not None and own is not None and own is not tokenizer:
        sentence = "Each window's tokens, 1234 of them, are the same: naïve or not.\n\n  x = [y]\n"
        if own(sentence)["input_ids"] != tokenizer(sentence)["input_ids"]:
            raise ModelError(
                f"{_name(model)} tokenizes the text in another way", "Compare models with the same tokenizer"
            )
    return Predictions(loaded, products)


def _load(model: Source, tokenizer: PreTrainedTokenizerBase | None) -> tuple[PreTrainedModel, Any]:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model, tokenizer
    from frugallm.models.open import load

    return load(model, dtype=torch.float32)


def _tokenizer(model: Source, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise DataError(f"{_name(model)} comes without a tokenizer", "Pass tokenizer=")
    return tokenizer


def _name(model: Any) -> str:
    """Return what a user calls the model."""
    if isinstance(model, str):
        return model
    name = getattr(model, "name_or_path", None) or getattr(model, "name", None)
    return str(name) if name else (type(model).__name__ if hasattr(model, "config") else str(model))
