"""A small job for tests that run the real thing: a model folder of four blocks, a text, and how they are given."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_llama import GGUFWriter, tiny_model

from frugallm.compression import run
from frugallm.evaluate.report import Report
from frugallm.models import GGUFFile, dense_model

BLOCKS = 4
SAMPLES, LENGTH = 24, 64
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
]
#: Files that time and the machine decide; everything else is the same in every run of a job.
MEASURED = {"measurements.json", "report.html", "README.md"}


def write_model(folder: Path, **changes: Any) -> Path:
    """Write a random llama model with its tokenizer, as anybody would save it."""
    folder.mkdir(parents=True)
    stored = GGUFWriter(folder)(model=tiny_model(**{"num_hidden_layers": BLOCKS} | changes))
    checkpoint = GGUFFile(stored)
    dense_model(checkpoint).save_pretrained(folder)
    for name, content in checkpoint.companions().items():
        (folder / name).write_bytes(content)
    (folder / "LICENSE").write_text("do what you like\n")
    stored.unlink()
    return folder


def write_text(path: Path, words: int = 2000, seed: int = 0) -> Path:
    """Write a text of common words in random order."""
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=words)) + "\n")
    return path


@dataclass(frozen=True)
class SmallJob:
    """A recipe for the small model, on one thread; ``run`` and ``command`` do the same."""

    model: Path
    text: Path
    steps: tuple[str, ...]
    out: Path

    def run(self, **options: Any) -> Report:
        """Do the job in this process; neither verified nor evaluated unless asked for."""
        fixed = {"samples": SAMPLES, "seq_len": LENGTH, "threads": 1, "text": self.text, "out": self.out}
        return run(
            str(self.model), list(self.steps), **(fixed | {"evaluate": False, "verify": False} | options)
        )

    def command(self, *more: str) -> list[str]:
        """Return the command line after ``frugal``."""
        numbers = ["--samples", str(SAMPLES), "--seq-len", str(LENGTH), "--threads", "1"]
        places = ["--text", str(self.text), "--out", str(self.out)]
        return ["run", str(self.model), *self.steps, *places, *numbers, *more]


def fixed_files(folder: Path) -> dict[str, bytes]:
    """Return name and content of all files that must come out the same every time."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in MEASURED}


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return everything below ``folder`` with its time and content: equal if nothing was touched."""
    return {
        str(p.relative_to(folder)): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in sorted(folder.rglob("*"))
    }
