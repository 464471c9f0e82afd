"""A tokenizer of SentencePiece's kind (Llama 2, Mistral, Gemma, Phi-3) as metadata of a GGUF file.

In a ``tokenizer.json`` it is a BPE that falls back to bytes, with its merges in order. llama.cpp keeps no merges: of all
neighbours whose joint text is a token, it joins those whose token has the highest score. That comes to the same where every
way to make a token of two others is among the merges, and the merges that make one token follow one another, as
``transformers`` writes them for a SentencePiece model. The score of a token is then minus the place of its merges.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from frugallm.errors import ExportError
from frugallm.models.gguf_tokenizer import BYTE, NORMAL, SPACE, UNKNOWN, USER_DEFINED

ONE_BYTE = re.compile("<0x[0-9A-F]{2}>")
ELSEWHERE = "Hand it on in another format"


def describe(
    described: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], name: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata that says what the tokenizer does, and what it does otherwise than llama.cpp.

    Parameters
    ----------
    described
        Content of ``tokenizer.json``.
    tokens, kinds
        Text and kind of the token of every id, as far as they do not depend on the kind of tokenizer.
    name
        What to call the model in messages.

    Raises
    ------
    ExportError
        If GGUF has no way to say it.
    """
    model = described["model"]
    prefix, notes = _spaces(described, name)
    added = {token["id"]: token for token in described["added_tokens"]}
    texts, found = list(tokens), list(kinds)
    for number, token in enumerate(tokens):
        if found[number] == NORMAL and ONE_BYTE.fullmatch(token):
            found[number] = BYTE
        elif token == model.get("unk_token"):
            found[number] = UNKNOWN
        elif found[number] == USER_DEFINED and added[number]["normalized"]:
            # found behind the normalizer here, and before it by llama.cpp
            texts[number] = token.replace(SPACE, " ")
    known = set(tokens)
    missing = [b for b in range(256) if f"<0x{b:02X}>" not in known and not (b < 128 and chr(b) in known)]
    if missing:
        raise ExportError(
            f"{name}: its tokenizer has no token for {len(missing)} of the 256 bytes", ELSEWHERE
        )
    if len(set(texts)) != len(texts):
        raise ExportError(f"{name}: two tokens of its tokenizer have the same text", ELSEWHERE)
    whole = {token for token, kind in zip(tokens, found) if kind != NORMAL}
    places = _places(model, whole, name)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [-float(places.get(token, len(places))) for token in tokens],
        "tokenizer.ggml.token_type": found,
        "tokenizer.ggml.add_space_prefix": prefix,
    }, notes


def _places(model: Mapping[str, Any], whole: set[str], name: str) -> dict[str, int]:
    """Return the place of each token that merges make; ``whole`` are tokens that none may make."""
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    places: dict[str, int] = {}
    before = ""
    for left, right in pairs:
        token = left + right
        if token != before and places.setdefault(token, len(places)) != len(places) - 1:
            raise _depends_on_merges(name, left, right)
        before = token
    known, vocabulary = set(pairs), model["vocab"]
    for token in vocabulary.keys() - whole:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary and (left, right) not in known:
                raise _depends_on_merges(name, left, right)
    return places


def _depends_on_merges(name: str, left: str, right: str) -> ExportError:
    return ExportError(
        f"{name}: its tokenizer has merges ('{left}' and '{right}') that scores of tokens, as GGUF keeps them, cannot say",
        ELSEWHERE,
    )


def _spaces(described: Mapping[str, Any], name: str) -> tuple[bool, list[str]]:
    """Say whether a space is put before a text, and where llama.cpp does so and the tokenizer does not."""
    normalizer, splitter = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    steps = [step for step in normalizer.get("normalizers", [normalizer]) if step]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepends = {"type": "Prepend", "prepend": SPACE}
    for step in steps:
        if step not in (replaces, prepends):
            raise ExportError(
                f"{name}: its tokenizer changes the text ({step['type']}) before it splits it, which GGUF cannot say",
                ELSEWHERE,
            )
    before, kind = prepends in steps, splitter.get("type")
    if kind == "Metaspace" and splitter["replacement"] == SPACE and not splitter["split"]:
        scheme = splitter["prepend_scheme"]
        if before or scheme == "never":
            return before, []
        notes = [
            "no space comes before a text that begins with one in this tokenizer, and always in llama.cpp"
        ]
        if scheme == "first":
            notes.append(
                "llama.cpp puts a space behind special tokens too, this tokenizer before the first text alone"
            )
        return True, notes
    idle = kind == "Split" and splitter["pattern"] == {"String": " "}  # no space is left to split at
    if replaces in steps and (kind is None or idle):
        return before, []
    raise ExportError(
        f"{name}: the splits of its tokenizer have no name in GGUF that is known here", ELSEWHERE
    )
