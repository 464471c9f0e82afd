"""Make the lists of known paragraphs that :mod:`frugallm.text.embedded` reads.

``python -m frugallm.text.embedded_lists STDLIB [STDLIB ...]`` takes the standard-library folders of several
Python versions, and keeps the paragraphs that all of them have, in the order of the first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from frugallm.text.embedded import (
    LISTS,
    TOPICS,
    Purpose,
    paragraph_hash,
    paragraphs,
    syntax_tree,
    topics_of,
)

CALIBRATION_CHARACTERS = 480_000
SKIPPED = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"),
    *("ensurepip", "tkinter", "turtledemo", "distutils", "pydoc_data"),
}


def write_lists(stdlibs: list[Path]) -> dict[str, int]:
    """Write both lists from the paragraphs all ``stdlibs`` share; return the characters per purpose."""
    used: set[str] = set()
    evaluate = [f"{TOPICS}#{topic}" for topic in sorted(topics_of(syntax_tree(stdlibs[0] / TOPICS)))]
    return {
        "evaluate": _write_list("evaluate", evaluate, stdlibs, used, sys.maxsize),
        "calibrate": _write_list(
            "calibrate", _documented_files(stdlibs[0]), stdlibs, used, CALIBRATION_CHARACTERS
        ),
    }


def _documented_files(stdlib: Path) -> list[str]:
    """List the library's public files, the best documented first: little parsing for much text."""
    shares = []
    for path in stdlib.rglob("*.py"):
        name = path.relative_to(stdlib)
        private = any(part.startswith("_") and part != "__init__.py" for part in name.parts)
        if private or SKIPPED.intersection(name.parts) or name.parts[0].startswith("config-"):
            continue
        size = sum(map(len, paragraphs(stdlib, name.as_posix())))
        if size > 500:
            shares.append((-size / path.stat().st_size, name.as_posix()))
    return [name for _, name in sorted(shares)]


def _write_list(
    purpose: Purpose, sources: Iterable[str], stdlibs: list[Path], used: set[str], limit: int
) -> int:
    lines, characters = [], 0
    everything = [{s: list(paragraphs(stdlib, s)) for s in sources} for stdlib in stdlibs]
    for source, own in everything[0].items():
        shared = set(own).intersection(*(other[source] for other in everything[1:]))
        fresh = [p for p in dict.fromkeys(own) if p in shared and paragraph_hash(p) not in used]
        if characters >= limit or not fresh:
            continue
        used.update(map(paragraph_hash, fresh))
        characters += sum(len(p) + 2 for p in fresh)
        lines.append(f"{source} {''.join(map(paragraph_hash, fresh))}\n")
    LISTS[purpose].write_text("".join(lines), "utf-8")
    return characters


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m frugallm.text.embedded_lists STDLIB [STDLIB ...]")
    sys.stdout.write(f"characters: {write_lists([Path(a) for a in sys.argv[1:]])}\n")
