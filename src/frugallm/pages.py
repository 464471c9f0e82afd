"""Documentation pages made from the methods themselves: nothing in them is written a second time.

A method's page is its module's docstring with the facts of its card, its parameters and its measured claim.
The index is the survey's outline, every row with its state.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from frugallm.catalogue import MethodEntry, method_entry, methods, rows, survey, unlisted
from frugallm.handoff import CHOSEN_LATER, MEANING, Place, changes, chosen_later, places
from frugallm.inference.contract import InferenceMethod
from frugallm.method import Card, Method, source_file

GENERATED = "<!-- made by 'frugal docs' from the code -->"


def method_pages() -> dict[str, str]:
    """Return the pages of all methods and their index, by path below ``docs``."""
    pages = {f"methods/{name}.md": method_page(method) for name, method in methods().items()}
    return {"methods/README.md": index_page(), **pages}


def write(pages: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the pages that changed, remove those of methods that are gone, and return what was touched."""
    behind = stale(pages, folder)
    for path in behind:
        name = path.relative_to(folder).as_posix()
        if name in pages:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages[name], encoding="utf-8")
        else:
            path.unlink()
    return behind


def stale(pages: Mapping[str, str], folder: Path) -> list[Path]:
    """Return the files below ``folder`` that are missing, out of date or no longer made."""
    differ = [
        folder / name
        for name, text in pages.items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]
    left = [p for p in sorted((folder / "methods").glob("*.md")) if f"methods/{p.name}" not in pages]
    return differ + left


def index_page() -> str:
    """Return the survey's outline with every row's state."""
    lines = ["# Methods", "", GENERATED, "", "The outline of the survey *Efficient Large Language Models*"]
    lines += [
        "([arXiv:2312.03863](https://arxiv.org/abs/2312.03863)), row by row. A row *works* when one of its"
    ]
    lines += [
        "methods passes conformance and its claim has been measured, both with the code as it is now; it is a"
    ]
    lines += ["*preview* when that is still missing."]
    section = ""
    for entry in survey():
        if entry.section != section:
            section = entry.section
            lines += [
                "",
                f"## {section}",
                "",
                "| row | state | methods | in one line |",
                "| --- | --- | --- | --- |",
            ]
        links = ", ".join(_link(method) for method in entry.methods)
        lines.append(f"| {entry.name} | {entry.state} | {links} | {entry.summary} |")
    lines += ["", "## Without a row", "", "Baselines and necessary parts.", ""]
    lines += [f"- {_link(method)}: {methods()[method.name].card.summary}" for method in unlisted()]
    return "\n".join(lines) + "\n"


def method_page(method: type[Method]) -> str:
    """Return the page of one method."""
    card, name = method.card, method.name()
    first, _, rest = (inspect.getdoc(sys.modules[method.__module__]) or "").partition("\n")
    entry = method_entry(name, method)
    lines = [
        f"# {card.title}",
        "",
        GENERATED,
        "",
        first,
        "",
        *_facts(name, method, entry),
        "",
        "## Parameters",
        "",
    ]
    lines += _parameters(method)
    lines += ["", *where_it_loads(method)]
    lines += ["", "## Claim", "", card.claim, "", _measured(card, entry), "", markdown(rest).strip()]
    return "\n".join(lines) + "\n"


def where_it_loads(method: type[Method]) -> list[str]:
    """Return the section about where a method's result loads, or where it acts if it has none.

    That is on a Llama: with its defaults, and what other choices change.
    """
    step = method()
    if isinstance(step, InferenceMethod):
        lines = ["## Where it acts", "", "In the engine, by itself; it changes no stored model."]
        return [*lines, "", "| | acts | |", "| --- | --- | --- |", *map(_place, places(step))]
    lines = ["## Where the result loads", "", f"On a Llama, with the defaults. {MEANING}"]
    lines += ["", "| | loads | |", "| --- | --- | --- |", *map(_place, places(step))]
    others = changes(method)
    if others:
        lines += ["", "Other choices, each by itself:", ""]
        lines += [f"- {', '.join(f'`{word}`' for word in words)}: {what}" for what, words in others.items()]
    return lines + (["", CHOSEN_LATER] if chosen_later(step) else [])


def _place(place: Place) -> str:
    name = f"`{place.name}`" if place.name.startswith("frugal") else place.name
    return f"| {name} | {place.seen} | {place.note} |".replace("  ", " ")


def markdown(text: str) -> str:
    """Turn a docstring (underlined headings, ``::`` blocks, double backticks) into Markdown."""
    lines: list[str] = []
    source = text.splitlines()
    in_block = False
    for i, line in enumerate(source):
        following = source[i + 1] if i + 1 < len(source) else ""
        if in_block and line and not line.startswith(" "):
            while lines[-1] == "":
                lines.pop()
            lines += ["```", ""]
            in_block = False
        if in_block:
            lines.append(line.removeprefix("    "))
        elif re.fullmatch(r"-{3,}", following) and line:
            lines.append(f"## {line}")
        elif re.fullmatch(r"-{3,}", line):
            lines.append("")
        elif line.endswith("::"):
            lines += [_inline(line.removesuffix(":")), "", "```text"]
            in_block = True
        else:
            lines.append(_inline(line))
    if in_block:
        lines.append("```")
    return re.sub(r"```text\n\n+", "```text\n", "\n".join(lines))


def _inline(line: str) -> str:
    return line.replace("``", "`")


def _facts(name: str, method: type[Method], entry: MethodEntry) -> list[str]:
    card = method.card
    row = next((r for r in rows() if r.id == card.row), None)
    step = "no step; the engine does it by itself" if issubclass(method, InferenceMethod) else f"`{name}`"
    facts = {"In a recipe": step, "State": entry.state}
    if row is not None:
        facts["Survey"] = f"{row.section}: {row.name}"
    if card.paper:
        link = f"[{card.paper}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.paper
        place = " ".join(str(part) for part in (card.venue, card.year) if part)
        facts["Paper"] = ", ".join(part for part in (card.authors, link, place) if part)
    if card.code:
        facts["Authors' code"] = f"<{card.code}>"
    source = Path(os.path.relpath(source_file(method), Path(__file__).parent)).as_posix()
    facts["Source"] = f"[{source}](../../src/frugallm/{source})"
    return ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items())]


def _measured(card: Card, entry: MethodEntry) -> str:
    if entry.claim is None:
        return "Not measured yet with the code as it is."
    claim = entry.claim
    verdict = "It held" if claim["passed"] else "It did not hold"
    values = f"{claim['metric']} {claim['value']:.4g} against {claim['baseline_value']:.4g}"
    reason = claim.get("reason") or card.reason
    why = f" {reason}" if reason and not claim["passed"] else ""
    return (
        f"{verdict} on {claim['model']}: {values} of {claim['baseline']} ({claim['better']} is better).{why}"
    )


def _link(entry: MethodEntry) -> str:
    return f"[{entry.name}]({entry.name}.md)"


def _parameters(method: type[Method]) -> list[str]:
    if not method.model_fields:
        return ["None."]
    rows = [_parameter(key, field) for key, field in method.model_fields.items()]
    return ["| parameter | default | allowed | meaning |", "| --- | --- | --- | --- |", *rows]


def _parameter(name: str, field: FieldInfo) -> str:
    default = (
        "required" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"
    )
    return f"| `{name}` | {default} | {allowed(field)} | {field.description or ''} |".replace("  ", " ")


def allowed(field: FieldInfo) -> str:
    """Return in words which values a parameter may take."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(rule, key)}"
        for rule in field.metadata
        for key, sign in signs.items()
        if hasattr(rule, key)
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{_value(value)}`" for value in get_args(annotation))
    names = {int: "integer", float: "number", bool: "`true` or `false`", str: "text", type(None): "`null`"}
    if annotation in names:
        return names[annotation]
    inner = [_type(part) for part in get_args(annotation) if part is not Ellipsis]
    if get_origin(annotation) in (tuple, list):
        return f"list of {inner[0]}"
    return " or ".join(inner)


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(_value(item) for item in value)}]"
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))
