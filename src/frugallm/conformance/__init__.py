"""The checks that every method passes: run by ``frugal check``, by the tests and by authors of plug-ins.

Which of them apply follows from the method's family and from what it declares. No method is named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from frugallm.conformance.outcome import Check, Outcome, run_check, unknown_expectations

if TYPE_CHECKING:
    from frugallm.method import Method

__all__ = ["Outcome", "check", "checks_for"]


def checks_for(method: type[Method]) -> list[Check]:
    """Return the checks that apply to ``method``, the cheap ones first."""
    from frugallm.compress.contract import BlockMethod, PrepareMethod, TableMethod
    from frugallm.conformance import (
        block_methods,
        inference_methods,
        methods,
        prepare_methods,
        table_methods,
        train_methods,
    )
    from frugallm.inference.contract import InferenceMethod
    from frugallm.training.contract import TrainMethod

    found = methods.checks(method)
    if issubclass(method, PrepareMethod):
        found += prepare_methods.checks(method)
    if issubclass(method, BlockMethod):
        found += block_methods.checks(method)
    if issubclass(method, TableMethod):
        found += table_methods.checks(method)
    if issubclass(method, TrainMethod):
        found += train_methods.checks(method)
    if issubclass(method, InferenceMethod):
        found += inference_methods.checks(method)
    return found


def check(method: type[Method]) -> list[Outcome]:
    """Run every check that applies to ``method``.

    Returns
    -------
    list of Outcome
        One for each check. A failure that the method's card expects counts as passed; one that it expects
        and that does not come counts as failed.
    """
    from frugallm.conformance.trial import Trial

    checks = checks_for(method)
    with Trial(method) as trial:
        outcomes = [run_check(one, trial) for one in checks]
    return outcomes + unknown_expectations(method, checks)
