"""The page ``docs/cli.md``, made from the commands themselves."""

from __future__ import annotations

from typing import Any

import typer
import typer.main


def command_page(app: typer.Typer) -> str:
    """Return the list of commands with their arguments and options as Markdown."""
    group: Any = typer.main.get_command(app)
    lines = ["# Commands", "", "<!-- made by 'frugal docs' from the code -->", ""]
    lines += ["| command | what it does |", "| --- | --- |"]
    for name, command in group.commands.items():
        lines.append(f"| [`frugal {name}`](#frugal-{name}) | {_cell(command.help)} |")
    for name, command in group.commands.items():
        lines += [
            "",
            f"## frugal {name}",
            "",
            command.help or "",
            "",
            "```",
            _usage(name, command),
            "```",
            "",
        ]
        lines += ["| argument or option | default | meaning |", "| --- | --- | --- |"]
        lines += [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    return "\n".join(lines) + "\n"


def _usage(name: str, command: Any) -> str:
    arguments = [_metavar(p) for p in command.params if p.param_type_name == "argument"]
    return " ".join(["frugal", name, "[OPTIONS]", *arguments])


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        label = _metavar(parameter)
    else:
        value = "" if parameter.is_flag else f" {_metavar(parameter)}"
        label = ", ".join(parameter.opts) + value
    default = parameter.default
    given = not parameter.is_flag if parameter.param_type_name == "option" else True
    shown = f"`{default}`" if given and default is not None and not parameter.required else ""
    required = "required" if parameter.required else shown
    return f"| `{_cell(label)}` | {required} | {_cell(parameter.help)} |"


def _metavar(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
