import errno
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from frugallm.cli.main import app, explain, main
from frugallm.cli.reference import command_page
from frugallm.errors import DataError, FrugalError, JobError, ModelError
from frugallm.recipe import Recipe

ROOT = Path(__file__).parents[2]
COMMANDS = get_command(app).commands


def options(command):
    return {flag for p in COMMANDS[command].params for flag in p.opts if flag.startswith("-")}


def test_the_commands_are_these():
    known = "run train evaluate generate chat bench inspect doctor methods reproduce check new docs export"
    assert list(COMMANDS) == known.split()


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "frugallm", "doktor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "doctor" in done.stderr


def test_the_options_of_run_are_frozen():
    frozen = "recipe out resume overwrite text samples seq-len seed eval-text windows no-evaluate shares dtype device"
    assert options("run") == {f"--{name}" for name in f"{frozen} threads progress quiet debug".split()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_debug(command, capsys):
    assert main([command, "--help"]) == 0
    assert COMMANDS[command].help.split(".")[0] in " ".join(capsys.readouterr().out.split())
    assert "--debug" in options(command)
    assert all(p.help for p in COMMANDS[command].params if p.name != "help")


def test_help_and_version(capsys):
    assert main([]) == 0
    assert "Commands" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert re.fullmatch(r"frugallm \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from frugallm.cli.main import main; main(['run', '--help']); print(sorted(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "transformers", "plotly", "numpy"):
        assert f"'{heavy}'" not in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rn"], "No such command 'rn'. Did you mean 'run'?"),
        (["run"], "Missing argument 'MODEL'. 'frugal run --help' shows how"),
        (["run", "m", "--sample", "3"], "--samples"),
        (["run", "m", "rtn", "--samples", "many", "--out", "x"], "'--samples'"),
        (["run", "m", "--out", "x"], "a recipe needs at least one step"),
        (["run", "m", "rtn"], "Add --out DIR"),
        (["run", "m", "gpqt", "--out", "x"], "no method 'gpqt' (step 1). did you mean 'gptq'?"),
        (
            ["run", "m", "gptq:bitz=4", "--out", "x"],
            "gptq has no parameter 'bitz' (step 1). did you mean 'bits'?",
        ),
        (["run", "m", "gptq:bits=9", "--out", "x"], "bits must be 2, 3, 4, 5, 6, 7 or 8; got 9 (step 1)"),
        (["run", "m", "--recipe", "w4a61", "--out", "x"], "did you mean 'w4a16'?"),
        (["run", "m", "rtn", "--out", "x", "--progress", "jsn"], "did you mean 'json'?"),
        (["methods", "--section", "9.9"], "the survey has no section '9.9'"),
        (["new", "quantise", "mine"], "there is no family 'quantise'. did you mean 'quantize'?"),
        (["new", "quantize", "My-Method"], "cannot be a method's name"),
        (["new", "quantize", "gptq"], "there is a method 'gptq' already"),
        (["check", "gpqt"], "did you mean 'gptq'?"),
        (["reproduce", "gpqt"], "did you mean 'gptq'?"),
        (["docs", "--check", "--to", "nowhere"], "Run: frugal docs"),
        (["generate", "m", "-p", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["bench", "m", "--repeats", "0"], "--repeats"),
        (["bench", "m", "--threads", "0"], "--threads"),
        (["bench", "m", "--json", "nowhere/x.json"], "nowhere/x.json cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (FrugalError("a is\n wrong", "Mend a"), "error: a is wrong. Mend a", 2),
        (DataError("no text"), "error: no text", 2),
        (JobError("it does not verify"), "error: it does not verify", 1),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "device: x. Free some space", 1),
        (OSError(errno.EROFS, "Read-only file system"), "file system. Choose a place that can be written", 1),
        (PermissionError(errno.EACCES, "Permission denied", "d"), "denied: d. Choose a place that can be", 1),
        (MemoryError(), "error: out of memory", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 9"), "error: out of memory", 1),
        (ZeroDivisionError("division\nby zero"), "internal error: ZeroDivisionError: division by zero", 1),
        (KeyboardInterrupt(), "", 130),
    ],
)
def test_every_error_is_one_line_and_a_status(error, line, status, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("frugallm.models.open_checkpoint", fail, raising=False)
    assert main(["inspect", "m"]) == status
    shown = capsys.readouterr().err
    assert line in shown
    assert "Traceback" not in shown and shown.count("\n") <= 1
    if status != 130:
        assert main(["inspect", "m", "--debug"]) == status
        assert "Traceback" in capsys.readouterr().err


def test_a_traceback_is_not_needed_to_explain():
    assert explain(ModelError("m is gone")) == ("error: m is gone", 2)
    wrong = typer.BadParameter("x must be 1.")
    assert explain(wrong) == ("error: Invalid value: x must be 1. 'frugal --help' shows how", 2)


def shown_commands():
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            command = line.strip().removeprefix("$ ")
            if command.startswith("frugal ") and not set("…[|") & set(command.replace("[*", "")):
                yield command


def parse(command):
    name, *arguments = shlex.split(command.partition(" #")[0])[1:]
    context = COMMANDS[name].make_context(name, arguments)
    if name == "run" and context.params["steps"]:
        Recipe.parse(context.params["steps"])


def test_commands_in_the_documentation_parse():
    for command in shown_commands():
        parse(command)


def test_a_wrong_command_in_the_documentation_would_be_seen():
    parse("frugal run m gptq:bits=4 --out d  # a remark")
    for wrong in ("frugal run m --outt d", "frugal run m gptq:bit=4 --out d", "frugal nothing"):
        with pytest.raises((FrugalError, KeyError, typer.BadParameter.__mro__[2])):
            parse(wrong)


def test_the_command_page_lists_every_option():
    page = command_page(app)
    for name in COMMANDS:
        section = page.partition(f"## frugal {name}\n")[2].partition("\n## ")[0]
        assert all(option in section for option in options(name))
