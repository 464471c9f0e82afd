"""Which methods there are, which rows of the survey they fill, and what is known to work.

Methods are found by importing the family packages: a class with a card, in a file of its own, is a method,
and the stem of that file is its name. Nothing is registered by hand.

Whether a row works is computed, never declared: one of its methods has passed conformance and has a measured
claim, both with the code as it is now. These records travel inside the package (``records/<method>.json``).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import pkgutil
import sys
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from frugallm.errors import FrugalError, RecipeError, nearest
from frugallm.method import Claim, Method, source_file

FAMILIES = ("frugallm.compress", "frugallm.inference")
RECORDS = Path(str(resources.files("frugallm"))) / "records"
State = Literal["works", "preview", "planned"]


class Row(BaseModel):
    """One row of the survey: a paper, a category or a framework."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    section: str
    kind: Literal["paper", "category", "framework"]
    name: str
    summary: str


class Conformance(BaseModel):
    """The conformance checks that a method has passed, when and with which versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: int
    checks: tuple[str, ...]
    date: str
    versions: dict[str, str]


class Record(BaseModel):
    """What has been proved about one version of a method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    version: str
    conformance: Conformance | None = None
    claim: Claim | None = None

    @property
    def complete(self) -> bool:
        """Whether conformance passed and a claim result, good or bad, is recorded."""
        return self.conformance is not None and self.conformance.passed > 0 and self.claim is not None


class MethodEntry(BaseModel):
    """A method as the list of methods shows it."""

    name: str
    state: State
    claim: dict[str, Any] | None


class Entry(Row):
    """A row with its state, its methods and the claim of its main method."""

    state: State
    methods: tuple[MethodEntry, ...]
    claim: dict[str, Any] | None


@cache
def _modules() -> dict[str, list[str]]:
    """Return the modules of the family packages by stem."""
    found: dict[str, list[str]] = {}
    for family in FAMILIES:
        package = importlib.import_module(family)
        for module in pkgutil.walk_packages(package.__path__, f"{family}."):
            if not module.ispkg:
                found.setdefault(module.name.rsplit(".", 1)[-1], []).append(module.name)
    return found


def _method_in(module: ModuleType) -> type[Method] | None:
    """Return the one class with a card that the module defines."""
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
        and "card" in vars(value)
    ]
    if len(classes) > 1:
        names = ", ".join(c.__name__ for c in classes)
        raise RecipeError(
            f"{module.__file__} holds several methods ({names})", "Give each method its own file"
        )
    return classes[0] if classes else None


@cache
def methods() -> dict[str, type[Method]]:
    """Return every method of the package by name."""
    found: dict[str, type[Method]] = {}
    for stem, modules in sorted(_modules().items()):
        for module in modules:
            method = _method_in(importlib.import_module(module))
            if method is not None and found.setdefault(stem, method) is not method:
                raise RecipeError(
                    f"two methods are called '{stem}': {source_file(found[stem])} and {module}", "Rename one"
                )
    return found


def find_method(name: str, folder: Path | None = None) -> type[Method]:
    """Return the method of that name, or the one in a Python file of your own.

    Parameters
    ----------
    name
        ``gptq``, or ``./my_method.py``.
    folder
        Where a relative path starts; the current folder if not given.

    Raises
    ------
    RecipeError
        If there is no such method; the hint offers the nearest name.
    """
    if name.endswith(".py"):
        return _load_file((folder or Path()) / Path(name).expanduser())
    for module in _modules().get(name, ()):  # only this one file is imported
        method = _method_in(importlib.import_module(module))
        if method is not None:
            return method
    raise RecipeError(
        f"there is no method '{name}'", f"{nearest(name, methods())} 'frugal methods' lists all"
    )


def step_name(method: type[Method]) -> str:
    """Return what a recipe calls ``method``: its name, or its path if it lies outside the package."""
    inside = method.__module__ in _modules().get(method.name(), ())
    return method.name() if inside else str(source_file(method).resolve())


def _load_file(path: Path) -> type[Method]:
    """Import a method from a file of the user's; the same content at the same place is the same class."""
    path = path.resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"cannot read the method {path}: {error.strerror}", "Give a Python file or a name"
        ) from None
    key = hashlib.sha256(f"{path}\0".encode() + content).hexdigest()[:12]
    name = f"frugallm_file_{key}.{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # the name ends with .py
        module = importlib.util.module_from_spec(spec)
        package = name.partition(".")[0]
        sys.modules.setdefault(package, ModuleType(package))  # pickle imports the parent first
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except (SyntaxError, ImportError) as error:
            del sys.modules[name]
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            what = f"cannot import the method {path}{line}: {error.msg}"
            raise RecipeError(what, "Mend the file") from error
    method = _method_in(sys.modules[name])
    if method is None:
        raise RecipeError(
            f"{path} holds no method", "A method is a class with a card; 'frugal new' writes one"
        )
    return method


@cache
def rows() -> tuple[Row, ...]:
    """Return the rows of the survey in its order."""
    text = resources.files("frugallm").joinpath("catalogue.yaml").read_text(encoding="utf-8")
    return tuple(
        Row(section=part["section"], kind=part["kind"], **row)
        for part in yaml.safe_load(text)
        for row in part["rows"]
    )


def survey(section: str = "") -> list[Entry]:
    """Return the rows whose section contains ``section``, each with its state and methods.

    Raises
    ------
    FrugalError
        If no section contains that text.
    """
    chosen = [row for row in rows() if section.lower() in row.section.lower()]
    if not chosen:
        sections = dict.fromkeys(row.section for row in rows())
        raise FrugalError(f"the survey has no section '{section}'", nearest(section, sections))
    by_row: dict[str, list[MethodEntry]] = {}
    for name, method in methods().items():
        by_row.setdefault(method.card.row, []).append(method_entry(name, method))
    return [_entry(row, by_row.get(row.id, [])) for row in chosen]


def unlisted() -> list[MethodEntry]:
    """Return the methods that fill no row: baselines and necessary parts."""
    return [method_entry(name, method) for name, method in methods().items() if not method.card.row]


def method_entry(name: str, method: type[Method]) -> MethodEntry:
    """Return a method's state and claim from its record, if that is of the current version."""
    record = read_record(name)
    current = record is not None and record.version == method.version()
    state: State = "works" if current and record is not None and record.complete else "preview"
    claim = record.claim if current and record is not None else None
    return MethodEntry(name=name, state=state, claim=None if claim is None else _plain_claim(claim))


def _entry(row: Row, entries: list[MethodEntry]) -> Entry:
    ordered = sorted(entries, key=lambda e: (e.state != "works", e.name))  # the main method first
    state: State = ordered[0].state if ordered else "planned"
    claim = ordered[0].claim if ordered else None
    return Entry(**row.model_dump(), state=state, methods=tuple(ordered), claim=claim)


def _plain_claim(claim: Claim) -> dict[str, Any]:
    hidden = {"details"} if claim.passed is False else {"details", "reason"}
    return claim.model_dump(mode="json", exclude=hidden)


def read_record(name: str, folder: Path | None = None) -> Record | None:
    """Return what is recorded about the method ``name``, of whatever version, or nothing."""
    path = (folder or RECORDS) / f"{name}.json"
    return Record.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_record(
    method: type[Method],
    conformance: Conformance | None = None,
    claim: Claim | None = None,
    folder: Path | None = None,
) -> Path:
    """Record what was found about the current version of a method.

    The part that is not given is kept if it was found with the same version, and dropped otherwise.
    """
    old = read_record(method.name(), folder)
    kept = old if old is not None and old.version == method.version() else None
    record = Record(
        method=method.name(),
        version=method.version(),
        conformance=conformance or (kept.conformance if kept else None),
        claim=claim or (kept.claim if kept else None),
    )
    path = (folder or RECORDS) / f"{method.name()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    return path
