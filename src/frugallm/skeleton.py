"""The file with which a new method begins: it works as it stands, and every part of it is to be replaced."""

from __future__ import annotations

import importlib
import keyword
import re
from importlib import resources
from pathlib import Path

from frugallm.catalogue import FAMILIES, methods
from frugallm.errors import FrugalError, OutputError, nearest


def families() -> dict[str, Path]:
    """Return the folders in which methods live, by name."""
    found = {}
    for package in FAMILIES:
        root = Path(next(iter(importlib.import_module(package).__path__)))
        folders = {file.parent for file in root.rglob("__init__.py")} - {root}
        inner = {folder for folder in folders if any(folder in other.parents for other in folders)}
        found.update({folder.name: folder for folder in sorted(folders - inner)})
    return found


def write_skeleton(family: str, name: str, to: Path | None = None) -> Path:
    """Write the file of a new method and return its path.

    Parameters
    ----------
    family
        ``quantize`` or ``unstructured`` (pruning).
    name
        Name of the method in snake_case; it becomes the file's stem.
    to
        Folder to write to; the family's own folder if not given.

    Raises
    ------
    FrugalError
        If there is no such family, or the name cannot be one.
    OutputError
        If the file exists.
    """
    known = families()
    if family not in known:
        raise FrugalError(f"there is no family '{family}'", nearest(family, known))
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise FrugalError(f"'{name}' cannot be a method's name", "Use small letters, digits and _")
    if name in methods():
        raise FrugalError(f"there is a method '{name}' already", "Choose another name")
    path = (known[family] if to is None else to) / f"{name}.py"
    if path.exists():
        raise OutputError(f"{path} exists", "Choose another name or folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(skeleton(family, name), encoding="utf-8")
    return path


def skeleton(family: str, name: str) -> str:
    """Return the content of a new method's file."""
    template = (
        resources.files("frugallm").joinpath("skeletons", f"{family}.py.txt").read_text(encoding="utf-8")
    )
    class_name = "".join(part.capitalize() for part in name.split("_"))
    return template.replace("{name}", name).replace("{Class}", class_name).replace("{title}", class_name)
