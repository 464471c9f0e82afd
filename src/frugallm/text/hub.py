"""Texts from the Hugging Face hub, by name, through the optional ``datasets`` package."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from frugallm.errors import DataError

NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[^:/\s]*){0,3}$")
FILE_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".csv", ".parquet", ".gz", ".zip", ".html", ".pdf")
PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class DatasetReference:
    """``name[:config[:split[:field]]]``, empty parts left out."""

    name: str
    config: str | None
    split: str
    field: str | None


def dataset_reference(written: str) -> DatasetReference:
    """Read a data set's reference, or say that the text was not found.

    Raises
    ------
    DataError
        If what is written can only be a file or folder; it is absent then.
    """
    if (
        not NAME.match(written)
        or written.split(":")[0].endswith(FILE_SUFFIXES)
        or written.startswith((".", "~"))
    ):
        raise DataError(f"no text at {written}", "Name a file, a folder, FILE.jsonl:FIELD or a data set")
    name, config, split, field = (written.split(":") + [""] * 3)[:4]
    return DatasetReference(name, config or None, split or "train", field or None)


def dataset_rows(reference: DatasetReference) -> list[dict[str, Any]]:
    """Return the records of one split, from the local cache when the hub is out of reach.

    Raises
    ------
    DataError
        If the ``datasets`` package, the network and cache, or the named part is missing.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"the data set {reference.name} needs the package 'datasets'", "pip install 'frugallm[datasets]'"
        ) from None
    if not _reachable(datasets.config.HF_ENDPOINT):
        return _load(datasets, reference, offline=True)
    return _load(datasets, reference, offline=False)


def _reachable(endpoint: str) -> bool:
    """Whether the hub answers at all: its own client retries for minutes before it says no."""
    address = urlsplit(endpoint)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def _load(datasets: Any, reference: DatasetReference, offline: bool) -> list[dict[str, Any]]:
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = offline or before[1]
    try:
        return list(datasets.load_dataset(reference.name, reference.config, split=reference.split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if offline:
            raise DataError(
                f"no file or folder {reference.name}; it is no cached data set, and the hub is out of reach",
                "Check the name, go online, or name a local file",
            ) from None
        raise DataError(f"cannot load the data set {reference.name}: {str(error).splitlines()[0]}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
