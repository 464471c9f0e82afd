"""Legal and illegal values of a method's parameters, made from their declarations."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from frugallm.method import Method

#: Matches some of the linears of every model that the checks use.
PATTERN = "*.layers.1.*"


def other_values(method: type[Method], name: str) -> list[Any]:
    """Return one or two legal values of a parameter that differ from its default."""
    field = method.model_fields[name]
    default = field.get_default(call_default_factory=True)
    found: list[Any] = []
    for value in _legal(field.annotation, field):
        if value != default and value not in found:
            found.append(value)
    return found if len(found) < 3 else [found[0], found[-1]]


def variants(method: type[Method]) -> Iterator[tuple[str, Any]]:
    """Yield every parameter with each of its :func:`other_values`."""
    for name in method.model_fields:
        for value in other_values(method, name):
            yield name, value


def wrong_values(method: type[Method], name: str) -> list[Any]:
    """Return values that a parameter must refuse: a wrong type, values out of range, an unknown choice."""
    field = method.model_fields[name]
    low, high = _range(field)
    found: list[Any] = [{"no": "value"}]
    if low is not None:
        found.append(low - 1)
    if high is not None:
        found.append(high + 1)
    if any(get_origin(kind) is Literal for kind in _kinds(field.annotation)):
        found += ["no such choice", 1_000_003]
    return found


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _range(field: FieldInfo) -> tuple[Any, Any]:
    """Return the smallest and the largest legal value, ``None`` where there is no such bound."""
    low: Any = None
    high: Any = None
    for fact in field.metadata:
        if isinstance(fact, annotated_types.Ge):
            low = fact.ge
        elif isinstance(fact, annotated_types.Le):
            high = fact.le
        elif isinstance(fact, annotated_types.Gt):
            low = fact.gt
        elif isinstance(fact, annotated_types.Lt):
            high = fact.lt
    return low, high


def _legal(annotation: Any, field: FieldInfo) -> Iterator[Any]:
    for kind in _kinds(annotation):
        if kind is bool:
            yield from (False, True)
        elif get_origin(kind) is Literal:
            yield from get_args(kind)
        elif get_origin(kind) is tuple:
            item = _kinds(get_args(kind)[0])[0]
            yield (get_args(item)[0],) if get_origin(item) is Literal else (PATTERN,)
        elif kind is str:
            yield "word"
        elif kind in (int, float):
            yield from _numbers(kind, field)


def _numbers(kind: type, field: FieldInfo) -> Iterator[Any]:
    """Yield a legal number inside the declared range."""
    low, high = _range(field)
    exclusive = any(isinstance(fact, annotated_types.Gt | annotated_types.Lt) for fact in field.metadata)
    if kind is int:
        start = low if low is not None else high if high is not None else 1
        yield start + (1 if exclusive and low is not None else 0)
        if high is None:
            yield start + 17  # 16 where -1 stands for something else
        elif field.default == start:
            yield min(start + 2, high)
        return
    low = 0.0 if low is None else float(low)
    yield low + (0.375 * (float(high) - low) if high is not None and math.isfinite(high) else 0.375)
