"""Where texts come from, and what is said when they cannot be had."""

import json
import socket
import sys
import time

import pytest

from frugallm.errors import DataError
from frugallm.text import open_text
from frugallm.text.embedded import LISTS, paragraph_hash

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_one_document_and_its_digest_ignores_path_and_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\n")
    a, b = open_text(tmp_path / "a.txt"), open_text(str(tmp_path / "b.txt"))
    assert a.documents == b.documents == ("one\ntwo\n",)
    assert a.digest == b.digest and not a.smoke and not a.chat
    (tmp_path / "b.txt").write_bytes(b"one\ntwo!\n")
    assert open_text(tmp_path / "b.txt").digest != a.digest


def test_digest_tells_documents_apart_from_their_concatenation(tmp_path):
    one = jsonl(tmp_path / "one.jsonl", [{"text": "ab"}])
    two = jsonl(tmp_path / "two.jsonl", [{"text": "a"}, {"text": "b"}])
    assert open_text(one).digest != open_text(two).digest


def test_a_folder_gives_its_text_files_in_order_of_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, content in {"b.txt": "second", "a.md": "first", "sub/c.txt": "third", "x.py": "code"}.items():
        (tmp_path / name).write_text(content)
    assert open_text(tmp_path).documents == ("first", "second", "third")


def test_json_lines_fields(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "a", "title": "A"}, {"text": "b", "title": "B"}])
    assert open_text(path).documents == ("a", "b")
    assert open_text(f"{path}:title").documents == ("A", "B")
    with pytest.raises(DataError, match=r"record 1 has no field 'titel'.*did you mean 'title'"):
        open_text(f"{path}:titel")


def test_json_lines_that_are_broken_name_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match="line 3 is no JSON"):
        open_text(path)
    path.write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(DataError, match="line 2 is no JSON object"):
        open_text(path)
    with pytest.raises(DataError, match="record 1: 'text' is no text"):
        open_text(jsonl(path, [{"text": 3}]))


def test_conversations_go_through_the_chat_template(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = jsonl(tmp_path / "chat.jsonl", [{"messages": messages}] * 2)
    with pytest.raises(DataError, match="no chat template"):
        open_text(path, "calibrate", tokenizer)
    tokenizer.chat_template = TEMPLATE
    try:
        text = open_text(path, "calibrate", tokenizer)
        assert text.chat and text.separator == ""
        assert text.documents == ("<user>Hi\n<assistant>Hello\n",) * 2
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DataError, match=r"record 1: the chat template refuses it .*must alternate"):
            open_text(path, "calibrate", tokenizer)
        with pytest.raises(DataError, match="record 1: 'messages' is no list"):
            open_text(jsonl(path, [{"messages": "Hi"}]), "calibrate", tokenizer)
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b" \n\n", "empty"), (b"ab\0cd", "binary"), (b"ab\xff\xfe", "not UTF-8 .byte 2")],
)
def test_useless_files_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_text(tmp_path / "t.txt")
    assert "t.txt" in str(error.value) and "\n" not in str(error.value) and error.value.hint


def test_absent_files_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="no text at"):
        open_text(tmp_path / "absent.txt")
    with pytest.raises(DataError, match=r"no \*.txt"):
        open_text(tmp_path)


def test_an_unknown_data_set_offline_is_answered_at_once(monkeypatch):
    def refuse(*_, **__):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    start = time.monotonic()
    with pytest.raises(DataError, match="no cached data set, and the hub is out of reach") as error:
        open_text("nobody/nothing-of-this-name:plain:test:text")
    assert time.monotonic() - start < 20 and "\n" not in str(error.value)


def test_a_data_set_needs_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'frugallm\[datasets\]'"):
        open_text("nobody/nothing")


def test_data_set_reference_reaches_the_loader(monkeypatch):
    import datasets

    from frugallm.text import hub

    calls = []
    monkeypatch.setattr(hub, "_reachable", lambda _: True)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or [{"page": "x"}, {"page": "y"}]
    )
    assert open_text("org/name:en:validation:page").documents == ("x", "y")
    assert calls == [(("org/name", "en"), {"split": "validation"})]


@pytest.mark.parametrize("purpose", ["calibrate", "evaluate"])
def test_embedded_text_is_smoke_and_holds_only_known_paragraphs(purpose):
    text = open_text(None, purpose)
    assert text.smoke and text.digest == open_text(None, purpose).digest
    known = LISTS[purpose].read_text()
    paragraphs = [p for document in text.documents for p in document.split("\n\n")]
    assert all(paragraph_hash(p) in known for p in paragraphs)
    assert LISTS[purpose].stat().st_size < 60_000
    # Room for 160 windows of 512 tokens, and for 24 of 2048, at four characters a token.
    assert sum(map(len, text.documents)) > {"calibrate": 160 * 512, "evaluate": 24 * 2048}[purpose] * 4


def test_the_two_embedded_texts_share_no_paragraph():
    shared = [
        {p for d in open_text(None, u).documents for p in d.split("\n\n")} for u in ("calibrate", "evaluate")
    ]
    assert not shared[0] & shared[1]


def test_a_missing_paragraph_changes_name_and_digest(monkeypatch, tmp_path):
    whole = open_text(None, "evaluate")
    changed = tmp_path / "evaluate.hashes"
    source, packed = LISTS["evaluate"].read_text().splitlines()[0].split(" ")
    changed.write_text(f"{source} {packed}00000000\n")
    monkeypatch.setitem(LISTS, "evaluate", changed)
    text = open_text(None, "evaluate")
    assert "1 known paragraphs absent" in text.name and text.digest != whole.digest
