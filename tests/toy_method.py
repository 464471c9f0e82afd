"""A method outside the package, for tests of recipes and of the catalogue: ``tests/toy_method.py:bits=3``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from frugallm.method import Card, Method


class ToyMethod(Method):
    card: ClassVar[Card] = Card(title="Toy", summary="does nothing")

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per weight")
    alpha: float = Field(0.5, ge=0, allow_inf_nan=False, description="strength")
    symmetric: bool = Field(True, description="whether zero is in the middle")
    label: str | None = Field(None, description="any text")
    skip: tuple[str, ...] = Field((), description="names to leave alone")
