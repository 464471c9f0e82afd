"""From tokens to text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frugallm.errors import ModelError


class TextStream:
    """The text of one answer, token by token; special tokens have none.

    A character may be spread over tokens; its text comes with its last one. What is left of a character when the
    answer ends is no text and never comes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise ModelError(
                "the tokenizer has no tokenizer.json, so its text cannot be streamed",
                "Save it as a fast tokenizer: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
            )
        self._begin()

    def push(self, token: int) -> str:
        """Return the text that a token completes, often none."""
        self._tokens.append(token)
        try:
            text = self._stream.step(self._backend, token) or ""
        except Exception as error:  # the tokenizers library raises bare Exception
            if "Invalid prefix" not in str(error):
                raise
            # Bytes that are no text can change what was decoded before; it goes on behind them.
            self._begin()
            self._tokens.append(token)
            text = self._stream.step(self._backend, token) or ""
        self._shown += text
        return text

    def flush(self) -> str:
        """Return the whole characters in front of an unfinished one at the end of the answer."""
        text = self._backend.decode(self._tokens, skip_special_tokens=True)
        rest = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._begin()
        return rest.rstrip("\ufffd")

    def _begin(self) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._shown = ""


class StopStrings:
    """Finds stop strings in text that comes in pieces, and holds back what may be the beginning of one."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return what is safe to show, and the stop string where one was found; nothing comes behind that."""
        self._held += text
        found = [(self._held.find(word), word) for word in self._words]
        found = [(place, word) for place, word in found if place >= 0]
        if found:
            place, word = min(found, key=lambda pair: pair[0])  # of several at one place, the first given
            shown, self._held = self._held[:place], ""
            return shown, word
        keep = max((_overlap(self._held, word) for word in self._words), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, None

    def flush(self) -> str:
        """Return what is held back, for the answer has ended."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, word: str) -> int:
    """Return how many characters at the end of ``text`` are a beginning of ``word``."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
