"""Which methods there are, and which rows of the survey they fill.

Methods are found by importing the family packages: a class with a card, in a file of its own, is a method,
and the stem of that file is its name. Nothing is registered by hand.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from frugallm.errors import RecipeError, nearest
from frugallm.method import Method, source_file

FAMILIES = ("frugallm.compress",)


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
