"""Errors that end a command: one line that says what, where and the mend.

Bad input (:class:`FrugalError` and its subclasses) ends a command with status 2; a job that could not be done
for another reason (:class:`JobError`: a full disk, a result that does not verify) with status 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FrugalError(Exception):
    """Something the user can mend.

    Parameters
    ----------
    message
        What is wrong and where, in one line.
    hint
        The one thing to do next; printed behind the message.
    """

    status = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class ParameterError(FrugalError):
    """A hyper-parameter is misspelt, has the wrong type or is out of range."""


class RecipeError(FrugalError):
    """A recipe cannot be read, or its steps make no sense in this order."""


class ModelError(FrugalError):
    """A model cannot be found, read or understood."""


class DataError(FrugalError):
    """A text cannot be found, read, or is too short."""


class OutputError(FrugalError):
    """An output folder is in the way, or what it holds belongs to another job."""


class ExportError(FrugalError):
    """A result cannot be written in the format asked for."""


class JobError(FrugalError):
    """The input was fine, the job was not: a full disk, a result that does not verify."""

    status = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the known word nearest to ``word``, or the list of known words."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=5, cutoff=0.5)
    close.sort(
        key=lambda name: sorted(name) != sorted(word)
    )  # letters in the wrong order are the likeliest slip
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
