import io

import pytest

from frugallm.errors import ParameterError
from frugallm.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(progress):
    with progress:
        progress.event("start", model="m")
        progress.event("stage", text="reading [the] model")
        progress.event("note", text="group_size is 64")
        progress.event("warn", text="no chat template")
        for index in range(1, 31):
            progress.event("block", index=index, of=30)
        progress.event("done", out="dir")


def test_json_is_one_object_per_line():
    stream = io.StringIO()
    run(Progress("json", stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == '{"event": "start", "model": "m"}'
    assert lines[6] == '{"event": "block", "index": 3, "of": 30}'
    assert lines[-1] == '{"event": "done", "out": "dir"}'
    assert len(lines) == 35


def test_auto_without_a_terminal_writes_a_few_plain_lines():
    stream = io.StringIO()
    run(Progress("auto", stream))
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["reading [the] model", "group_size is 64", "warning: no chat template"]
    assert [line.split(",")[0] for line in lines[3:]] == ["block 1 of 30", "block 30 of 30"]


def test_the_bar_keeps_notes_and_shows_blocks():
    stream = Terminal()
    run(Progress("auto", stream))
    shown = stream.getvalue()
    assert "group_size is 64" in shown
    assert "warning: no chat template" in shown
    assert "30/30" in shown


def test_none_writes_nothing():
    stream = Terminal()
    run(Progress("none", stream))
    assert stream.getvalue() == ""


def test_a_reader_that_went_away_does_not_end_the_job():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    run(Progress("json", Closed()))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ParameterError, match="did you mean 'json'"):
        Progress("jsn")
