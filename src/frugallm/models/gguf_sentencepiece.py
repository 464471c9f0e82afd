"""The SentencePiece tokenizer of a GGUF file, rebuilt with the ``tokenizers`` library.

The file keeps a score per token and no merges. Every way to make a token of two others becomes a merge; merges of tokens with
higher scores come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return all merges that make a token, in the order in which llama.cpp prefers them.

    Parameters
    ----------
    scores
        Text to score of the tokens that others make, or are made of.
    """
    found = []
    for token in sorted(scores, key=lambda token: (-scores[token], token)):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found += [(left, right) for left, right in cuts if left in scores and right in scores]
    return found


def build_backend(
    tokens: list[str], scores: Mapping[str, float], unknown: str | None, space: str, *, prefix: bool
) -> Any:
    """Build the tokenizer without its special tokens.

    Parameters
    ----------
    tokens
        Text of every id.
    scores
        Those of them that are found by merging.
    unknown
        Token of what is not known.
    space
        What stands for a space in tokens.
    prefix
        Whether a space comes before every text.
    """
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(
        BPE(vocabulary, merges_of(scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", space)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), replace]) if prefix else replace
    decoding = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if prefix else decoding)
    return backend
