"""What a check is, and what comes out of running one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from frugallm.conformance.trial import Trial
    from frugallm.method import Method

#: A check takes a trial of one method; it raises :class:`CheckFailed` unless the method passes.
Check = Callable[["Trial"], None]


class CheckFailed(Exception):
    """A method does not do what every method of its kind must do; the message says how."""


def ensure(holds: bool, reason: str) -> None:
    """Fail the check with ``reason`` unless ``holds``."""
    if not holds:
        raise CheckFailed(reason)


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check; ``reason`` says why it failed, or why its failure was expected."""

    name: str
    passed: bool
    reason: str = ""


def run_check(check: Check, trial: Trial) -> Outcome:
    """Run one check, and hold its outcome against what the method's card expects."""
    name = check.__name__
    expected = expectations(trial.method).get(name)
    failure = ""
    try:
        check(trial)
    except CheckFailed as error:
        failure = str(error)
    except Exception as error:  # a method under test may raise anything; none of it may end the other checks
        failure = f"{type(error).__name__}: {error}"
    if expected is None:
        return Outcome(name, not failure, failure)
    if failure:
        return Outcome(name, True, f"fails as the card expects: {expected}")
    return Outcome(name, False, f"passed, but the card expects it to fail: {expected}")


def expectations(method: type[Method]) -> dict[str, str]:
    """Return which checks a method's card expects to fail, with the reasons."""
    card = getattr(method, "card", None)
    return dict(card.expect_fail) if card is not None else {}


def unknown_expectations(method: type[Method], checks: Iterable[Check]) -> list[Outcome]:
    """Return a failure for every expectation that names no check."""
    known = {check.__name__ for check in checks}
    return [
        Outcome(name, False, f"the card expects '{name}' to fail, but there is no such check")
        for name in expectations(method)
        if name not in known
    ]
