"""What a method is: a frozen set of hyper-parameters, a card, and a claim that can be checked.

A method is one technique of the survey, in one file. Its parameters are pydantic fields; command-line help, recipe
files, documentation pages and error messages are all made from them, so nothing is declared twice.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from frugallm.errors import ParameterError, nearest

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class Card(BaseModel):
    """Facts about a method that programs need: its paper, what it needs, and what it must beat.

    Attributes
    ----------
    title, paper, arxiv, year, venue
        How the paper calls the method, and where it appeared.
    row
        Id of the survey's row that the method fills, or ``""`` for a baseline that has none.
    summary
        One line for lists.
    baseline
        The naive thing that :meth:`Method.claim` compares with.
    claim
        The paper's main sentence as the claim checks it.
    holds
        The verdict that the claim reaches in the tests. A claim that fails stays on record with its ``reason``.
    expect_fail
        Conformance checks that do not hold, with the reason. An expected failure that passes is an error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    summary: str
    paper: str = ""
    authors: str = ""
    year: int | None = None
    venue: str = ""
    arxiv: str = ""
    code: str = ""
    row: str = ""
    baseline: str = ""
    claim: str = ""
    holds: bool = True
    reason: str = ""
    expect_fail: dict[str, str] = {}


class Claim(BaseModel):
    """The measured outcome of a claim check: ``value`` against ``baseline_value`` of one metric."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    value: float
    baseline: str
    baseline_value: float
    passed: bool
    better: Literal["lower", "higher"] = "lower"
    model: str = ""
    reason: str = ""
    details: dict[str, Any] = {}


class Method(BaseModel):
    """Base of every method: frozen, keyword-only parameters and nothing else on the instance."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    card: ClassVar[Card]

    def __init__(self, **parameters: Any) -> None:
        try:
            super().__init__(**parameters)
        except ValidationError as error:
            raise parameter_error(type(self), error) from None

    @classmethod
    def name(cls) -> str:
        """Return the name in recipes and on the command line: the stem of the method's file."""
        return cls.__module__.rsplit(".", 1)[-1]

    @classmethod
    def version(cls) -> str:
        """Return a digest of the method's code; comments and docstrings do not change it."""
        source = inspect.getsource(sys.modules[cls.__module__])
        return code_digest(source)

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Check the paper's main sentence on the bench's model."""
        raise NotImplementedError(f"{cls.__name__} has no claim check")

    @classmethod
    def claim_needs(cls) -> str:
        """Return what this machine lacks to check the claim, or nothing."""
        return ""

    def settings(self) -> dict[str, Any]:
        """Return all parameters, defaults written out, as plain JSON values."""
        return self.model_dump(mode="json")

    def changed(self) -> dict[str, Any]:
        """Return the parameters that differ from their defaults."""
        fields = type(self).model_fields
        return {
            k: v
            for k, v in self.settings().items()
            if v != _plain(fields[k].get_default(call_default_factory=True))
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def code_digest(source: str) -> str:
    """Return twelve hex digits of the syntax tree of ``source`` without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


def parameter_error(cls: type[Method], error: ValidationError) -> ParameterError:
    """Turn pydantic's error into one line: method, parameter, what is allowed, what was given."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    method = cls.name()
    if first["type"] == "extra_forbidden":
        return ParameterError(f"{method} has no parameter '{name}'", nearest(name, cls.model_fields))
    message = re.sub(r"^(Input should be|Value error, )\s*", "", first["msg"])
    if first["type"] == "value_error":
        return ParameterError(f"{method}: {message}")
    return ParameterError(f"{method}: {name} must be {message}; got {first['input']!r}")


def source_file(cls: type[Method]) -> Path:
    """Return the file that holds the method."""
    return Path(inspect.getfile(cls))
