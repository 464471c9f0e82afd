"""Check the claims of methods on a real model and keep what came out, good or bad.

Each claim's outcome becomes ``results/<model>/<method>.json``; ``docs/results.md`` is a table of these files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from frugallm.catalogue import methods, write_record
from frugallm.errors import ParameterError
from frugallm.method import Claim, Method
from frugallm.progress import Progress

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench


class Result(BaseModel):
    """One claim, checked on one model.

    Attributes
    ----------
    method, version, title, sentence
        The method, the digest of its code, how the paper calls it, and what it claims.
    claim
        What came out.
    model, model_digest
        The model and the SHA-256 of its weights; none of models that were trained for the claim.
    date, seconds
        When (UTC), and how long it took.
    machine, versions
        Where, and with what.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    version: str
    title: str
    sentence: str
    claim: Claim
    model: str
    model_digest: str
    date: str
    seconds: float
    machine: dict[str, Any]
    versions: dict[str, str]


def reproduce(
    chosen: Sequence[type[Method]],
    bench: Bench,
    folder: Path,
    record: bool = False,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Check the claims of some methods, one after the other, and write each result as soon as it is there.

    Parameters
    ----------
    chosen
        The methods.
    bench
        The model with its texts.
    folder
        Folder ``results``; a result goes to ``<model>/<method>.json`` in it.
    record
        Also keep the claims inside the package, for the list of methods.
    """
    shown = progress or Progress()
    for index, method in enumerate(chosen, 1):
        shown.event("stage", text=f"{method.name()}: {method.card.claim}")
        started = time.perf_counter()
        claim = method.claim(bench)
        result = _result(method, claim, bench, time.perf_counter() - started)
        path = result_file(folder, result)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        if record:
            write_record(method, claim=claim)
        shown.event("claim", index=index, of=len(chosen))
        yield result


def able(chosen: Sequence[type[Method]], named: bool, progress: Progress) -> list[type[Method]]:
    """Return the methods whose claims can be checked on this machine; those left out are noted.

    Raises
    ------
    ParameterError
        If one cannot that the user has ``named``.
    """
    found = []
    for method in chosen:
        needs = method.claim_needs()
        if needs and named:
            raise ParameterError(
                f"the claim of {method.name()} needs {needs}", "Leave it out, or see 'frugal doctor'"
            )
        if needs:
            progress.event("note", text=f"{method.name()} is left out: its claim needs {needs}")
        else:
            found.append(method)
    return found


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers."""
    from frugallm.evaluate.evaluation import VERSIONS

    return {name: metadata.version(name) for name in VERSIONS}


def result_file(folder: Path, result: Result) -> Path:
    """Return where a result is kept."""
    return folder / result.model.replace("/", "--") / f"{result.method}.json"


def results_page(folder: Path) -> str:
    """Return the table of all results below ``folder`` as Markdown, the worst verdicts not left out."""
    found = [
        Result.model_validate_json(p.read_text("utf-8"))
        for p in sorted(folder.glob("*/*.json"))
        if _is_ours(p)
    ]
    lines = ["# Results", "", "<!-- made by 'frugal reproduce' from results/ -->", ""]
    lines += [
        "Every method's claim against the naive thing it must beat: on a real model, or, for methods that act while a",
        "model is trained, on small ones trained on the spot. `frugal reproduce` measures them again. The seconds are",
        "those of the whole check, other work on the machine included.",
    ]
    for model in sorted({result.model for result in found}):
        lines += ["", f"## {model}", "", "| method | claim | measured | baseline | verdict | s |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        lines += [_row(result) for result in found if result.model == model]
    return "\n".join(lines) + "\n"


def _row(result: Result) -> str:
    claim = result.claim
    current = methods().get(result.method)
    stale = "" if current is not None and current.version() == result.version else " (earlier code)"
    verdict = ("held" if claim.passed else f"not held: {claim.reason}") + stale
    measured = f"{claim.metric} {claim.value:.4g}"
    baseline = f"{claim.baseline_value:.4g} ({claim.baseline})"
    return (
        f"| {result.title} | {result.sentence} | {measured} | {baseline} | {verdict} | {result.seconds:.0f} |"
    )


def _is_ours(path: Path) -> bool:
    content = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(content, dict) and {"method", "claim", "version"} <= content.keys()


def _result(method: type[Method], claim: Claim, bench: Bench, seconds: float) -> Result:
    from frugallm.evaluate.machine import machine

    return Result(
        method=method.name(),
        version=method.version(),
        title=method.card.title,
        sentence=method.card.claim,
        claim=claim,
        model=claim.model or bench.model_name,
        # A claim about training makes its models on the spot.
        model_digest=bench.checkpoint.digest() if claim.model in ("", bench.model_name) else "",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        machine=machine(),
        versions=installed_versions(),
    )
