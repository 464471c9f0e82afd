"""How a request wants its tokens chosen, checked before any work."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from frugallm.errors import ParameterError, nearest

#: Alternatives that may be asked for beside each token.
MOST_LOGPROBS = 100
MOST_CHOICES = 64
CONSTRAINTS = ("json_schema", "regex", "grammar")


def _listed(value: Any) -> Any:
    """Take one stop string for a list of one, and a list for a tuple."""
    return (value,) if isinstance(value, (str, int)) and not isinstance(value, bool) else value


def _not_empty(words: tuple[str, ...]) -> tuple[str, ...]:
    if any(not word for word in words):
        raise ValueError("stop holds an empty string, which stands at every place")
    return words


#: As large as it can be without leaving float32 behind all penalties.
Bias = Annotated[float, Field(ge=-1e9, le=1e9)]


class SamplingParams(BaseModel):
    """Parameters of one request; frozen, all by keyword.

    Applied in this order: ``logit_bias``, penalties, ``temperature``, ``top_k``, ``top_p``, ``min_p``. What is drawn
    depends on the seed, the choice's number and the token's position, and on nothing that happened before.

    Attributes
    ----------
    temperature
        0: always the likeliest token (of equals, the one with the lowest id).
    top_k
        Only the so many likeliest tokens; 0: all. Tokens as likely as the last of them stay.
    top_p
        Only the likeliest tokens that together reach this share.
    min_p
        Only tokens at least this share as likely as the likeliest.
    presence_penalty, frequency_penalty
        Taken from the logit of every token that was generated already, once or as often as it was.
    repetition_penalty
        Positive logits of tokens in prompt or answer are divided by it, negative ones multiplied.
    seed
        ``None``: a new one for each request; the result says which.
    logit_bias
        Token id to what is added to its logit; ``-100`` and below in effect bans it.
    stop
        Texts that end an answer; they do not become part of it.
    stop_token_ids
        Tokens that end an answer as the model's own end does.
    max_tokens
        Most tokens generated; an answer also ends where the context or the cache is full.
    logprobs
        ``k``: log-probabilities of each token and its ``k`` likeliest alternatives, by the unchanged model.
    n
        Answers to the same prompt, which is computed once.
    ignore_eos
        Go on behind the model's end of text.
    json_schema, regex, grammar
        What an answer must follow, one of them: a JSON schema, a regular expression, or a grammar in Lark's form. An
        answer that ``max_tokens`` cuts off is incomplete all the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    logit_bias: dict[int, Bias] = {}
    stop: Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_not_empty)] = ()
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_listed)] = ()
    max_tokens: int = Field(default=128, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    ignore_eos: bool = False
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __init__(self, **parameters: Any) -> None:
        try:
            super().__init__(**parameters)
        except ValidationError as error:
            raise _explained(error) from None

    @model_validator(mode="after")
    def _possible(self) -> SamplingParams:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n is {self.n} with temperature 0: all answers would be the same")
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} cannot go together")
        return self

    @property
    def constraint(self) -> tuple[str | None, Any]:
        """Name and value of what the answer must follow; ``None`` twice where it is free."""
        return next(
            ((n, getattr(self, n)) for n in CONSTRAINTS if getattr(self, n) is not None), (None, None)
        )

    @property
    def penalized(self) -> bool:
        """Whether tokens so far change the next one's logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    def check_tokens(self, vocabulary: int) -> None:
        """Check token ids against the model's vocabulary.

        Raises
        ------
        ParameterError
            If an id is not in it.
        """
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            wrong = [i for i in ids if not 0 <= i < vocabulary]
            if wrong:
                raise ParameterError(
                    f"{name} names token {wrong[0]}, the model has {vocabulary}",
                    f"Take 0 to {vocabulary - 1}",
                )


def _explained(error: ValidationError) -> ParameterError:
    """Turn pydantic's error into one line: parameter, what is allowed, what was given."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return ParameterError(
            f"sampling has no parameter '{name}'", nearest(name, SamplingParams.model_fields).capitalize()
        )
    message = re.sub(r"^(Input should be|Value error,)\s*", "", first["msg"])
    if first["type"] == "value_error":
        return ParameterError(message)
    return ParameterError(f"{name} must be {message}; got {first['input']!r}")
