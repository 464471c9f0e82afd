"""``frugal doctor``: what this machine and this installation can do."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata, resources

import typer

from frugallm.cli.options import Debug

EXTRAS = {"datasets": "texts from Hugging Face data sets", "pytest": "the test suite"}


def doctor(debug: Debug = False) -> None:
    """Show processor features, kernels, missing extras, and versions against the pins."""
    for line in report():
        typer.echo(line)


def report() -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"frugallm {metadata.version('frugallm')}"
    yield f"Python {platform.python_version()}, {platform.platform()}"
    yield from machine_lines()
    yield kernels_line()
    for package, purpose in EXTRAS.items():
        yield f"extra: {package} {'is installed' if installed(package) else 'is missing'} ({purpose})"
    yield ""
    yield f"{'package':<22}{'installed':<14}{'pinned':<14}"
    for package, pinned in pins().items():
        version = installed(package)
        if version is not None:
            same = version.partition("+")[0] == pinned  # 2.13.0+cpu is 2.13.0
            remark = "" if same else "not what this release was measured with"
            yield f"{package:<22}{version:<14}{pinned:<14}{remark}".rstrip()


def kernels_line() -> str:
    """Return which path of the kernels is used, and which this processor could run."""
    from frugallm.kernels import library

    usable = library.usable_paths()
    return f"kernels: {library.path_name()} (native and usable here: {', '.join(usable) or 'none'})"


def machine_lines() -> Iterator[str]:
    """Yield what the processor is and which features of it matter here."""
    from frugallm.evaluate.machine import machine

    for name, value in machine().items():
        yield f"{name}: {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def pins() -> dict[str, str]:
    """Return package to version as this release was developed and measured."""
    text = resources.files("frugallm").joinpath("pins.txt").read_text(encoding="utf-8")
    lines = (line.partition("==") for line in text.splitlines() if not line.startswith("#"))
    return {package: version for package, _, version in lines if version}


def installed(package: str) -> str | None:
    """Return the installed version of a package, if there is one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
