"""``frugal generate`` and ``frugal chat`` on a tiny model."""

import io
import signal

import pytest

from frugallm.cli import chat
from frugallm.cli.chat import Talk, finished_part, interruptible
from frugallm.cli.main import main
from frugallm.engine.llm import LLM
from frugallm.engine.sampling import SamplingParams
from frugallm.errors import DataError
from small_engine import letters_tokenizer
from tiny_decoders import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    letters_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", "reference")


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


def test_an_answer_is_drawn_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(chat.sys.stdin, "isatty", lambda: True, raising=False)
    screen = chat.Terminal("tiny")
    screen.show(piece for piece in ["# Ti", "tle\n", "\nsome *words*", " more"])
    shown = capsys.readouterr().out
    assert "Title" in shown and "some words more" in shown and "4 tokens" in shown
