"""``frugal generate`` and ``frugal chat`` on a tiny model."""

import io
import re
import signal
import subprocess
import sys

import pytest

from frugallm.cli import chat
from frugallm.cli.chat import Talk, finished_part, interruptible
from frugallm.cli.main import main
from frugallm.engine.llm import LLM
from frugallm.engine.sampling import SamplingParams
from frugallm.errors import DataError


def test_generate_prints_the_answer(folder, capsys):
    assert main(["generate", str(folder), "-p", "abc", "--raw", "--max-new-tokens", "9"]) == 0
    expected = LLM(folder).generate("abc", SamplingParams(temperature=0, max_tokens=9))[0].text
    captured = capsys.readouterr()
    assert captured.out == expected + "\n" and "note" not in captured.err


def test_generate_uses_the_chat_template_and_the_seed(folder, capsys):
    drawn = ["generate", str(folder), "-p", "abc", "--temperature", "1", "--max-new-tokens", "9", "--seed"]
    printed = []
    for seed in ("1", "1", "2"):
        assert main([*drawn, seed]) == 0
        printed.append(capsys.readouterr().out)
    messages = [{"role": "user", "content": "abc"}]
    params = SamplingParams(temperature=1, max_tokens=9, seed=1)
    assert printed[0] == printed[1] == LLM(folder).generate(messages, params)[0].text + "\n" != printed[2]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["generate", "-p", "x" * 300, "--raw"], "the prompt has 300 tokens, the model's context 256"),
        (["generate", "-p", "x", "--top-p", "0"], "top_p must be greater than 0; got 0.0"),
        (["chat", "--seed", "-1"], "seed must be greater than or equal to 0; got -1"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, arguments, line):
    assert main([arguments[0], str(folder), *arguments[1:]]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and line in error and "\n" not in error


def test_a_chat_through_pipes(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n\n/reset\nabc\n/nothing\n/quit\nnever said\n"))
    assert main(["chat", str(folder), "--temperature", "0", "--max-new-tokens", "9"]) == 0
    captured = capsys.readouterr()
    messages = [{"role": "user", "content": "abc"}]
    answer = LLM(folder).generate(messages, SamplingParams(temperature=0, max_tokens=9))[0].text
    assert captured.out == f"{answer}\n" * 2
    assert "What was said is forgotten." in captured.err and "/quit" in captured.err


def test_a_chat_without_input_or_with_what_is_no_text_is_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", "no-such-model"]) == 2
    assert capsys.readouterr().err.startswith("error: standard input is closed. A chat reads from")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    assert main(["chat", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: what is said cannot be read") and error.count("\n") == 1


def test_a_character_that_is_none_is_said_and_the_chat_goes_on(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\udcff\nabc\n"))
    assert main(["chat", str(folder), "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert "is no Unicode character" in captured.err and captured.out


def test_who_stops_reading_ends_the_command_without_a_word(folder):
    command = [sys.executable, "-m", "frugallm", "generate", str(folder), "-p", "abc", "--raw"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


class Heard(LLM):
    """Remembers what it is asked."""

    asked = ()

    def stream(self, prompt, params=None):
        self.asked = (*self.asked, prompt)
        return super().stream(prompt, params)


def test_a_talk_remembers_until_it_is_told_to_forget(folder):
    llm = Heard(folder)
    talk = Talk(llm, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), "be brief")
    first = "".join(talk.answer("one"))
    "".join(talk.answer("two"))
    assert [message["content"] for message in llm.asked[1]] == ["be brief", "one", first, "two"]
    assert llm.engine.requests == set()
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "be brief"}]


def test_an_answer_broken_off_is_remembered_and_a_refused_question_is_not(folder):
    llm = Heard(folder)
    talk = Talk(llm, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    pieces = talk.answer("one")
    said = next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": said} and not llm.engine.requests
    with pytest.raises(DataError, match="context 256"):
        list(talk.answer("x" * 300))
    assert len(talk.messages) == 2


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one", ""),
        ("one\n\ntwo", "one"),
        ("one\n\n", "one"),
        ("```\na\n\nb", ""),
        ("~~~\na\n```\n\nb", ""),
        ("```\na\n\nb\n```\n\nc\n\nd", "```\na\n\nb\n```\n\nc"),
    ],
)
def test_what_is_finished_can_be_drawn_for_good(text, done):
    finished, rest = finished_part(text)
    assert finished == done and text.endswith(rest) and finished.strip("\n") in text


def test_the_first_interrupt_is_noted_and_the_second_raises():
    with interruptible() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_edited_question_knows_its_width(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "hi")
    assert next(chat.Terminal("tiny").lines()) == "hi"
    assert "\033" in asked[0]
    assert re.sub("\001[^\002]*\002", "", asked[0]) == "you › "


def test_an_answer_is_drawn_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(chat.sys.stdin, "isatty", lambda: True, raising=False)
    screen = chat.Terminal("tiny")
    screen.show(piece for piece in ["# Ti", "tle\n", "\nsome *words*", " more"])
    shown = capsys.readouterr().out
    assert "Title" in shown and "some words more" in shown and "4 tokens" in shown
