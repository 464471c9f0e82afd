"""The embedded default texts: what every Python brings along, restricted to paragraphs known by hash.

Calibration uses docstrings of the standard library, evaluation ``pydoc_data.topics`` (language reference).
Neither is copied into this package: it ships only lists of paragraph hashes, made by
:mod:`frugallm.text.embedded_lists`, and uses a paragraph when the running Python has it. The lists hold what
several Python versions have in common, in a fixed order, so these versions give the same text. Figures made
from it are smoke figures: the text is small and technical.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from frugallm.errors import DataError

Purpose = Literal["calibrate", "evaluate"]

TOPICS = "pydoc_data/topics.py"
NAMES = {"calibrate": "standard-library docstrings", "evaluate": "pydoc_data.topics"}
LISTS = {p: Path(__file__).with_name(f"{p}.hashes") for p in ("calibrate", "evaluate")}


def embedded_documents(purpose: Purpose) -> tuple[tuple[str, ...], int]:
    """Return the embedded text and how many of its known paragraphs the running Python lacks.

    Returns
    -------
    tuple
        One document per source file or topic, in the order of the list; and the number of missing paragraphs.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    documents, missing = [], 0
    for source, hashes in _read_list(LISTS[purpose]):
        found = {paragraph_hash(p): p for p in paragraphs(stdlib, source)}
        known = [found[h] for h in hashes if h in found]
        missing += len(hashes) - len(known)
        if known:
            documents.append("\n\n".join(known))
    if not documents:
        raise DataError(
            f"the embedded text needs the sources of Python's standard library, and {stdlib} has none",
            "Name a text: --text FILE",
        )
    return tuple(documents), missing


def paragraphs(stdlib: Path, source: str) -> Iterator[str]:
    """Yield the long paragraphs of one file's docstrings, or of one topic (``pydoc_data/topics.py#name``)."""
    path, _, topic = source.partition("#")
    tree = syntax_tree(stdlib / path)
    texts = [topics_of(tree).get(topic, "")] if topic else _docstrings(tree)
    for text in texts:
        for paragraph in text.split("\n\n"):
            # Short lines are headings and signatures; they are no prose and would collide between files.
            if len(paragraph.split()) >= 8:
                yield paragraph.strip("\n").rstrip()


_trees: dict[Path, ast.AST] = {}


def syntax_tree(path: Path) -> ast.AST:
    """Parse a file, keeping the last one: the topics are asked for one by one."""
    if path not in _trees:
        _trees.clear()
        try:
            _trees[path] = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):  # absent in this Python
            _trees[path] = ast.Module([], [])
    return _trees[path]


def _docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def topics_of(tree: ast.AST) -> dict[str, str]:
    """Return the dictionary that ``pydoc_data/topics.py`` assigns."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def paragraph_hash(paragraph: str) -> str:
    """Return the eight hex digits that stand for a paragraph in a list."""
    return hashlib.sha256(paragraph.encode()).hexdigest()[:8]


def _read_list(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield ``(source, hashes)`` from lines of the form ``source HASHES``: eight hex digits per paragraph."""
    for line in path.read_text("utf-8").splitlines():
        source, packed = line.split(" ")
        yield source, [packed[i : i + 8] for i in range(0, len(packed), 8)]
