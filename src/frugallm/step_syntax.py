"""How one step of a recipe is written on a command line: ``gptq:bits=4,skip=[*.o_proj,"*.down_proj"]``.

A value is an integer, a float, ``true``, ``false``, ``null``, a string or a list of these in brackets. A
string needs quotes only where it would otherwise be read as something else; quoted strings follow JSON's
rules (single quotes are taken literally). A comma inside brackets or quotes does not split.
"""

from __future__ import annotations

import json
import re
from typing import Any

from frugallm.errors import RecipeError

_STEP = re.compile(r"(?P<name>[^:]*\.py|[^:]*)(?::(?P<rest>.*))?", re.DOTALL)
_KEY = re.compile(r"\s*([^=,\[\]\"'\s]+)\s*=\s*")
_INTEGER = re.compile(r"[+-]?\d+")
_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None, "none": None}


def parse_step(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``name:key=value,…`` into the step's name and its parameters.

    Raises
    ------
    RecipeError
        If the text is not of this form or names a parameter twice.
    """
    match = _STEP.fullmatch(text.strip())
    if match is None or not match["name"]:
        raise RecipeError(
            f"cannot read the step '{text}'", "A step is written NAME or NAME:key=value,key=value"
        )
    return match["name"], _Reader(match["rest"] or "", text).parameters()


def format_step(name: str, parameters: dict[str, Any]) -> str:
    """Write a step so that :func:`parse_step` reads the same name and parameters."""
    if not parameters:
        return name
    return f"{name}:" + ",".join(f"{key}={_write(value)}" for key, value in parameters.items())


def _write(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(_write(item) for item in value)}]"
    if not isinstance(value, str):
        return json.dumps(value)
    bare = re.fullmatch(r"[\w*?.:/+-]+", value, re.ASCII) and isinstance(_scalar(value), str)
    return value if bare else json.dumps(value)


def _scalar(word: str) -> Any:
    if _INTEGER.fullmatch(word):
        return int(word)
    if _FLOAT.fullmatch(word):
        return float(word)
    return _WORDS.get(word.lower(), word)


class _Reader:
    """Reads the parameters of one step from left to right."""

    def __init__(self, rest: str, step: str) -> None:
        self.rest = rest
        self.step = step
        self.place = 0

    def parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self.place < len(self.rest):
            key = _KEY.match(self.rest, self.place)
            if key is None:
                raise self.error("expected key=value")
            if key[1] in found:
                raise self.error(f"{key[1]} is given twice")
            self.place = key.end()
            found[key[1]] = self.value(closing="")
            if self.place < len(self.rest):
                self.expect(",")
        return found

    def value(self, closing: str) -> Any:
        self.skip_space()
        first = self.rest[self.place : self.place + 1]
        if first == "[":
            return self.items()
        if first == '"':
            return self.quoted()
        if first == "'":
            return self.literal()
        return _scalar(self.bare(closing))

    def items(self) -> list[Any]:
        self.expect("[")
        found: list[Any] = []
        while not self.at("]"):
            found.append(self.value(closing="]"))
            if not self.at("]"):
                self.expect(",")
        self.expect("]")
        return found

    def quoted(self) -> str:
        try:
            value, self.place = json.JSONDecoder().raw_decode(self.rest, self.place)
        except json.JSONDecodeError:
            raise self.error("a quoted string is not closed or not written as in JSON") from None
        return value

    def literal(self) -> str:
        end = self.rest.find("'", self.place + 1)
        if end < 0:
            raise self.error("a quoted string is not closed")
        value, self.place = self.rest[self.place + 1 : end], end + 1
        return value

    def bare(self, closing: str) -> str:
        """Read up to a comma or ``closing``; brackets inside, as in ``layers.[0-3]``, belong to the word."""
        start, depth = self.place, 0
        while self.place < len(self.rest):
            letter = self.rest[self.place]
            if depth == 0 and letter in ("," + closing):
                break
            depth += {"[": 1, "]": -1}.get(letter, 0)
            if depth < 0:
                raise self.error("a bracket is closed that was not opened")
            self.place += 1
        word = self.rest[start : self.place].strip()
        if not word:
            raise self.error("a value is missing")
        return word

    def skip_space(self) -> None:
        while self.rest[self.place : self.place + 1].isspace():
            self.place += 1

    def at(self, letter: str) -> bool:
        self.skip_space()
        return self.rest.startswith(letter, self.place)

    def expect(self, letter: str) -> None:
        if not self.at(letter):
            raise self.error(f"expected '{letter}'")
        self.place += 1

    def error(self, what: str) -> RecipeError:
        where = f"at '{self.rest[self.place :]}'" if self.place < len(self.rest) else "at its end"
        hint = "Write NAME:key=value,key=value; lists in brackets; quotes around text with commas or brackets"
        return RecipeError(f"cannot read the step '{self.step}' {where}: {what}", hint)
