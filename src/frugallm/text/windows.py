"""Token windows: cut from a text in one way for everybody, so that figures can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frugallm.errors import DataError, ParameterError
from frugallm.text.source import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Longer documents are tokenized from their beginning only, when that is all that is asked for.
CHARACTERS_PER_TOKEN = 32


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that begins every window, or ``None``: the BOS rule.

    A window begins with the BOS token if and only if the tokenizer itself adds one when it encodes text with
    special tokens. A window's length includes it.
    """
    encoded = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and len(encoded) > 0 and encoded[0] == bos else None


def tokenize(text: Text, tokenizer: PreTrainedTokenizerBase, at_least: int | None = None) -> Tensor:
    """Return the tokens of all documents in a row, ``(tokens,)``, none added by the tokenizer.

    Parameters
    ----------
    text, tokenizer
        The text, and the tokenizer of the model.
    at_least
        If given, stop once there are that many: the result is a beginning of the whole.
    """
    ids: list[int] = []
    documents = [d + text.separator for d in text.documents[:-1]] + [text.documents[-1]]
    for document in documents:
        ids += _encode(document, tokenizer, None if at_least is None else at_least - len(ids))
        if at_least is not None and len(ids) >= at_least:
            return torch.tensor(ids[:at_least])
    return torch.tensor(ids)


def _encode(document: str, tokenizer: PreTrainedTokenizerBase, at_least: int | None) -> list[int]:
    if at_least is not None and len(document) > CHARACTERS_PER_TOKEN * at_least:
        begin = _encode(document[: CHARACTERS_PER_TOKEN * at_least], tokenizer, None)
        # The cut may split a word; the tokens before it are those of the whole document.
        if len(begin) >= 2 * at_least:
            return begin[:at_least]
    # verbose=False: a text longer than the model's context is no mistake here.
    return tokenizer(document, add_special_tokens=False, verbose=False, return_attention_mask=False)[
        "input_ids"
    ]


def evaluation_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, windows: int | None = None, length: int = 2048
) -> Tensor:
    """Cut windows from the start of the concatenated text, without overlap.

    Parameters
    ----------
    text, tokenizer
        The text, and the tokenizer of the model.
    windows
        How many, or ``None`` for all whole windows of the text.
    length
        Tokens per window, a leading BOS token included.

    Returns
    -------
    Tensor
        Token ids (int64), ``(windows, length)``.

    Raises
    ------
    DataError
        If the text is too short.
    """
    _check(windows=1 if windows is None else windows, length=length)
    bos = leading_bos(tokenizer)
    body = length - (bos is not None)
    ids = tokenize(text, tokenizer, None if windows is None else windows * body)
    count = len(ids) // body if windows is None else windows
    if count < 1 or len(ids) < count * body:
        fit, count = len(ids) // body, max(count, 1)
        raise DataError(
            f"the text {text.name} has {len(ids):,} tokens; {count} x {length} need {count * body:,}",
            f"windows={fit} fits, or take a longer text" if fit else "Take a longer text or shorter windows",
        )
    return _with_bos(ids[: count * body].view(count, body), bos)


def calibration_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, samples: int = 128, length: int = 512, seed: int = 0
) -> Tensor:
    """Choose windows of the concatenated text at random places that do not overlap, none twice.

    Parameters
    ----------
    text, tokenizer
        The text, and the tokenizer of the model.
    samples
        How many windows.
    length
        Tokens per window, a leading BOS token included.
    seed
        Decides the places; the same seed gives the same windows.

    Returns
    -------
    Tensor
        Token ids (int64), ``(samples, length)``.

    Raises
    ------
    DataError
        If the text is too short.
    """
    _check(samples=samples, length=length)
    bos = leading_bos(tokenizer)
    body = length - (bos is not None)
    ids = tokenize(text, tokenizer)
    places = len(ids) // body
    if places < samples:
        mends = [f"samples={places}"] if places else []
        mends += [f"seq_len={len(ids) // samples}"] if len(ids) // samples >= 16 else []
        raise DataError(
            f"the text {text.name} has {len(ids):,} tokens; {samples} x {length} need {samples * body:,}",
            f"{' or '.join(mends)} fits, or take a longer text" if mends else "Take a longer text",
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(len(ids) - places * body + 1, (1,), generator=generator))
    chosen = torch.randperm(places, generator=generator)[:samples]
    return _with_bos(ids[offset : offset + places * body].view(places, body)[chosen], bos)


def _with_bos(windows: Tensor, bos: int | None) -> Tensor:
    if bos is None:
        return windows.contiguous()
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        least = 2 if name == "length" else 1
        if number < least:
            raise ParameterError(f"{name} of the token windows must be at least {least}; got {number}")
