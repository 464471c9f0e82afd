"""Open a text: a file, a folder, a JSON-lines field, conversations, a data set, or the embedded default."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from frugallm.errors import DataError, nearest
from frugallm.text.embedded import NAMES, Purpose, embedded_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER_SUFFIXES = (".txt", ".md")


class Text(BaseModel):
    """Documents, and what is needed to say in a result which text it was.

    Attributes
    ----------
    name
        What the user wrote, or the name of an embedded text.
    digest
        sha256 of the documents (hex); independent of the path.
    smoke
        Whether figures from this text are smoke figures (the embedded default).
    documents
        The documents, in order.
    chat
        Whether the documents are conversations in the model's chat template.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    smoke: bool = False
    documents: tuple[str, ...]
    chat: bool = False

    @property
    def separator(self) -> str:
        """What stands between two documents: a blank line; nothing between conversations."""
        return "" if self.chat else "\n\n"


def open_text(
    source: str | Path | None, purpose: Purpose = "evaluate", tokenizer: PreTrainedTokenizerBase | None = None
) -> Text:
    """Open a text.

    Parameters
    ----------
    source
        ``None`` (the embedded default for ``purpose``), a text file, a folder of ``*.txt`` and ``*.md``,
        ``FILE.jsonl`` or ``FILE.jsonl:FIELD`` (default field: ``text``; records with ``messages`` are
        conversations), or the name of a Hugging Face data set: ``name[:config[:split[:field]]]``.
    purpose
        Which embedded text ``None`` stands for.
    tokenizer
        Its chat template writes conversations out; needed for them only.

    Raises
    ------
    DataError
        If the text cannot be found or read, or is empty.
    """
    if source is None:
        return _embedded(purpose)
    name = str(source)
    path, field = _split_field(name)
    if path.is_dir():
        documents, chat = tuple(_folder(path)), False
    elif path.suffix == ".jsonl" and path.is_file():
        documents, chat = _json_lines(path, field, tokenizer)
    elif path.exists():
        documents, chat = (_read(path),), False
    else:
        from frugallm.text.hub import dataset_reference, dataset_rows

        reference = dataset_reference(name)
        documents, chat = _records(dataset_rows(reference), name, reference.field, tokenizer)
    documents = tuple(d for d in documents if d.strip())
    if not documents:
        raise DataError(f"the text {name} is empty", "Name a text with words in it")
    return Text(name=name, digest=_digest(documents), documents=documents, chat=chat)


def _embedded(purpose: Purpose) -> Text:
    documents, missing = embedded_documents(purpose)
    name = NAMES[purpose]
    if missing:
        major, minor = sys.version_info[:2]
        name += f" ({missing} known paragraphs absent in Python {major}.{minor})"
    return Text(name=name, digest=_digest(documents), smoke=True, documents=documents)


def _digest(documents: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()


def _split_field(name: str) -> tuple[Path, str | None]:
    head, colon, field = name.rpartition(":")
    if colon and field and head.endswith(".jsonl"):
        return Path(head).expanduser(), field
    return Path(name).expanduser(), None


def _read(path: Path) -> str:
    """Read UTF-8 text; line ends become ``\\n`` so that one text has one digest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "Check the permissions") from None
    if b"\0" in data:
        raise DataError(f"{path} is binary, not text", "Name a text file in UTF-8")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start})", "Convert it: iconv -t UTF-8") from None


def _folder(path: Path) -> Iterator[str]:
    files = sorted(p for p in path.rglob("*") if p.suffix in FOLDER_SUFFIXES and p.is_file())
    if not files:
        raise DataError(f"no *.txt or *.md file in the folder {path}", "Name one with text files")
    return (_read(file) for file in files)


def _json_lines(
    path: Path, field: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[tuple[str, ...], bool]:
    rows = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number} is no JSON ({error.msg})", "Write one object a line"
            ) from None
        if not isinstance(rows[-1], dict):
            raise DataError(f"{path}, line {number} is no JSON object", "Write one object a line")
    return _records(rows, str(path), field, tokenizer)


def _records(
    rows: list[dict[str, Any]], name: str, field: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[tuple[str, ...], bool]:
    """Take one field of every record: the one named, else ``messages`` (conversations), else ``text``."""
    first = rows[0] if rows else {}
    chat = field == "messages" or (field is None and "messages" in first)
    field = field or ("messages" if chat else "text")
    documents = []
    for number, row in enumerate(rows, 1):
        if field not in row:
            raise DataError(f"{name}, record {number} has no field '{field}'", nearest(field, row))
        value = row[field]
        if not chat and not isinstance(value, str):
            raise DataError(f"{name}, record {number}: '{field}' is no text", f"Fields: {', '.join(row)}")
        documents.append(_conversation(value, f"{name}, record {number}", tokenizer) if chat else value)
    return tuple(documents), chat


def _conversation(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Write a conversation out through the model's chat template."""
    from jinja2 import TemplateError

    if tokenizer is None or not tokenizer.chat_template:
        raise DataError(
            f"{where} is a conversation, and the model has no chat template",
            "Use plain text (field 'text'), or a model with a template",
        )
    wanted = isinstance(messages, list) and all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
    )
    if not wanted:
        raise DataError(
            f"{where}: 'messages' is no list of objects with 'role' and 'content'", "See the model's template"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses it ({error})", "Mend the conversation") from None
