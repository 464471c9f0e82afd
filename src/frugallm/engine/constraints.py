"""Answers that follow a JSON schema, a regular expression or a grammar, through the package ``llguidance``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from frugallm.engine.sampling import SamplingParams
from frugallm.errors import JobError, ModelError, ParameterError


class Constraint:
    """What an answer may go on with: the state of one grammar behind one answer."""

    def __init__(self, name: str, matcher: Any, vocabulary: int) -> None:
        self._name, self._matcher, self._vocabulary = name, matcher, vocabulary

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return which tokens may come next, ``(vocabulary,)``; at its end those that end a text.

        Raises
        ------
        JobError
            If no token of the model leads on, or the grammar grows beyond what ``llguidance`` can follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():  # the mask then says that the text may end, which is wrong
            raise JobError(f"the {self._name} cannot be followed any further ({_reason(self._matcher)})")
        return np.unpackbits(bits, count=self._vocabulary, bitorder="little").astype(np.bool_)

    def accept(self, token: int) -> bool:
        """Go on behind a token that was allowed; return whether nothing can come any more."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def copy(self) -> Constraint:
        """Return the same state for another answer."""
        return Constraint(self._name, self._matcher.deep_copy(), self._vocabulary)


class Constraints:
    """Makes constraints for one tokenizer, whose tokens are looked through when the first one is asked for.

    Parameters
    ----------
    tokenizer
        A fast tokenizer.
    vocabulary
        Logits of the model, which may be more than the tokenizer has tokens.
    ends
        Tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, ends
        self._words: Any = None

    def make(self, params: SamplingParams) -> Constraint | None:
        """Return the constraint that parameters ask for, in its first state, or ``None``.

        Raises
        ------
        ParameterError
            If the grammar cannot be understood, or ``llguidance`` is not installed.
        ModelError
            If the tokenizer is of a kind that ``llguidance`` does not read.
        """
        name, text = params.constraint
        if name is None:
            return None
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ParameterError(
                f"{name} needs the package llguidance", "Install it: pip install 'frugallm[grammar]'"
            ) from error
        readers: dict[str, Callable[[Any], str]] = {
            "json_schema": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
            "grammar": LLMatcher.grammar_from_lark,
        }
        try:
            value = json.loads(text) if name == "json_schema" and isinstance(text, str) else text
        except ValueError as error:
            raise ParameterError(f"json_schema cannot be read as JSON ({error})") from error
        matcher = LLMatcher(self._prepared(), readers[name](value), log_level=0)
        if matcher.is_error():
            raise ParameterError(f"{name} cannot be understood ({_reason(matcher)})")
        return Constraint(name, matcher, self._vocabulary)

    def _prepared(self) -> Any:
        from llguidance.hf import from_tokenizer

        if self._words is None:
            try:
                self._words = from_tokenizer(self._tokenizer, self._vocabulary, sorted(self._ends) or None)
            except ValueError as error:
                raise ModelError(f"this model's tokenizer takes no grammar ({error})") from error
        return self._words


def _reason(matcher: Any) -> str:
    """Return what is wrong, without the library's inner state."""
    return str(matcher.get_error().partition("<state>")[0].strip())
