"""A recipe: an ordered list of methods with their parameters.

The same object is written in three ways: on a command line (``smoothquant gptq:bits=4``), in a YAML file
(``steps: [ {gptq: {bits: 4}} ]``) and in Python (``Recipe(steps=[GPTQ(bits=4)])``). Steps run as written;
nothing is reordered.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError

from frugallm.catalogue import find_method, step_name
from frugallm.errors import ParameterError, RecipeError, nearest
from frugallm.method import Method
from frugallm.step_syntax import format_step, parse_step

_KEYS = ("title", "why", "steps")
_NO_STEP = "A step is a method with its parameters, e.g. gptq:bits=4; 'frugal methods' lists them"


class Recipe(BaseModel):
    """An ordered list of methods.

    Attributes
    ----------
    steps
        The methods, in the order in which they are applied.
    title, why
        What the recipe is called and what it is for; they change nothing.

    Examples
    --------
    >>> recipe = Recipe.parse(["gptq:bits=3,group_size=64", "embedding:bits=8"])
    >>> recipe.to_cli()
    ['gptq:bits=3,group_size=64', 'embedding']
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[SerializeAsAny[Method], ...]
    title: str = ""
    why: str = ""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RecipeError(f"recipe: {where}: {first['msg']}", _NO_STEP) from None
        if not self.steps:
            raise RecipeError("a recipe needs at least one step", _NO_STEP)

    @classmethod
    def of(cls, steps: Recipe | str | Path | Method | Iterable[Method | str]) -> Recipe:
        """Make a recipe from whatever names one: a recipe, a method, methods or steps, a file, a preset."""
        if isinstance(steps, Recipe):
            return steps
        if isinstance(steps, str | Path):
            return cls.load(steps)
        if isinstance(steps, Method):
            return cls(steps=[steps])
        return cls(steps=[_parse(s, i) if isinstance(s, str) else s for i, s in enumerate(steps, 1)])

    @classmethod
    def parse(cls, steps: Sequence[str]) -> Recipe:
        """Read steps as they are written on a command line.

        Raises
        ------
        RecipeError, ParameterError
            If a step or a parameter is unknown or malformed; the message says which step it is.
        """
        return cls(steps=[_parse(step, i) for i, step in enumerate(steps, 1)])

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a YAML file, or a preset that comes with the package (``w4a16``).

        Raises
        ------
        RecipeError, ParameterError
            If there is no such recipe or it is malformed; the message names the file and the line.
        """
        path = _locate(source)
        label = str(path) if isinstance(path, Path) else path.name
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise RecipeError(f"cannot read the recipe {label}: {reason}", "Give a YAML file") from None
        folder = path.parent if isinstance(path, Path) else None
        return cls(**_Document(text, label, folder).fields())

    def settings(self) -> list[dict[str, dict[str, Any]]]:
        """Return every step as ``{name: {parameter: value}}``, defaults written out, as plain JSON values."""
        return [{step.name(): step.settings()} for step in self.steps]

    def digest(self) -> str:
        """Return the SHA-256 (hex) of :meth:`settings`; title and reason do not count."""
        canonical = json.dumps(self.settings(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def versions(self) -> dict[str, str]:
        """Return the version of each method's code by name."""
        return {step.name(): step.version() for step in self.steps}

    def to_cli(self) -> list[str]:
        """Return one command-line argument per step, without the parameters that are at their defaults."""
        return [format_step(step_name(type(step)), step.changed()) for step in self.steps]

    def to_yaml(self, defaults: bool = False) -> str:
        """Return the recipe as a YAML file, on request with the defaults written out."""
        fields: dict[str, Any] = {key: getattr(self, key) for key in ("title", "why") if getattr(self, key)}
        fields["steps"] = [
            {name: parameters} if parameters else name
            for name, parameters in (
                (step_name(type(step)), step.settings() if defaults else step.changed())
                for step in self.steps
            )
        ]
        return yaml.safe_dump(fields, sort_keys=False, width=110)


def presets() -> dict[str, Traversable]:
    """Return the recipes that come with the package, by name."""
    files = resources.files("frugallm").joinpath("recipes").iterdir()
    return {Path(f.name).stem: f for f in sorted(files, key=lambda f: f.name) if f.name.endswith(".yaml")}


def _locate(source: str | Path) -> Path | Traversable:
    shipped = presets()
    if str(source) in shipped:
        return shipped[str(source)]
    path = Path(source)
    if path.exists():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RecipeError(f"there is no recipe file {path}", f"Recipes with a name: {', '.join(shipped)}")
    raise RecipeError(f"there is no recipe '{source}'", nearest(str(source), shipped))


def _parse(step: str, position: int) -> Method:
    name, parameters = parse_step(step)
    try:
        return find_method(name)(**parameters)
    except (ParameterError, RecipeError) as error:
        raise type(error)(f"{error.message} (step {position})", error.hint) from None


class _Loader(yaml.SafeLoader):
    """Reads ``2:4`` as the words that they are, as YAML 1.2 does; YAML 1.1 makes a number to the base of 60 of it."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        """Return the tag of a node."""
        if kind is yaml.ScalarNode and implicit[0] and re.fullmatch(r"\d+:\d+", value):
            return "tag:yaml.org,2002:str"
        return super().resolve(kind, value, implicit)


class _Document:
    """One YAML file, read node by node so that every error knows its line."""

    def __init__(self, text: str, label: str, folder: Path | None) -> None:
        self.label = label
        self.folder = folder
        try:
            self.loader = _Loader(text)  # it looks for characters that cannot be printed
            self.root = self.loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            quotes = "Put quotes around patterns that begin with *"
            hint = quotes if "alias" in str(error) else "Give a YAML file"
            raise RecipeError(f"{label}{line}: not valid YAML: {error.problem}", hint) from None
        except yaml.YAMLError as error:
            raise RecipeError(f"{label}: not valid YAML: {error}", "Give a YAML file") from None

    def fields(self) -> dict[str, Any]:
        if not isinstance(self.root, yaml.MappingNode):
            raise RecipeError(f"{self.label}: a recipe is a mapping with the key 'steps'", _NO_STEP)
        found: dict[str, Any] = {}
        for key, node in self.pairs(self.root):
            if key not in _KEYS:
                raise RecipeError(f"a recipe has no key '{key}' ({self.at(node)})", nearest(str(key), _KEYS))
            found[key] = self.steps(node) if key == "steps" else self.value(node)
        if not found.get("steps"):
            raise RecipeError(f"{self.label}: a recipe needs at least one step under 'steps'", _NO_STEP)
        return found

    def steps(self, node: yaml.Node) -> list[Method]:
        if not isinstance(node, yaml.SequenceNode):
            raise RecipeError(f"'steps' must be a list ({self.at(node)})", "Write one '- method' per line")
        return [self.step(item) for item in node.value]

    def step(self, node: yaml.Node) -> Method:
        if isinstance(node, yaml.ScalarNode):
            name, parameters = parse_step(node.value)
            return self.method(node, name, parameters, {})
        pairs = self.pairs(node) if isinstance(node, yaml.MappingNode) else []
        if len(pairs) != 1:
            hint = "Write '- gptq' or '- gptq: {bits: 4}', one method per step"
            raise RecipeError(f"a step must be one method ({self.at(node)})", hint)
        key, below = pairs[0]
        name = str(key)
        if not isinstance(below, yaml.MappingNode):
            if self.value(below) is None:
                return self.method(node, name, {}, {})
            raise RecipeError(f"parameters must be a mapping ({self.at(below)})", "For example {bits: 4}")
        places = {str(key): at for key, at in self.pairs(below)}
        return self.method(node, name, {key: self.value(at) for key, at in places.items()}, places)

    def method(
        self, node: yaml.Node, name: str, parameters: dict[str, Any], places: dict[str, yaml.Node]
    ) -> Method:
        """Make one method; its errors gain the line of the parameter they name, or of the step."""
        try:
            return find_method(name, self.folder)(**parameters)
        except (ParameterError, RecipeError) as error:
            named = [
                place for key, place in places.items() if re.search(rf"\b{re.escape(key)}\b", error.message)
            ]
            where = self.at(named[0] if named else node)
            raise type(error)(f"{error.message} ({where})", error.hint) from None

    def pairs(self, node: yaml.MappingNode) -> list[tuple[Hashable, yaml.Node]]:
        found: dict[Hashable, yaml.Node] = {}
        for key_node, below in node.value:
            key = self.value(key_node)
            if isinstance(key, list | dict) or key in found:
                raise RecipeError(
                    f"key '{key}' is given twice or is no word ({self.at(key_node)})", "Keep one"
                )
            found[key] = below
        return list(found.items())

    def value(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_object(node, deep=True)
        except (yaml.MarkedYAMLError, ValueError) as error:
            problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
            raise RecipeError(
                f"cannot read a value ({self.at(node)}): {problem}", "Put it in quotes"
            ) from None

    def at(self, node: yaml.Node) -> str:
        return f"{self.label}, line {node.start_mark.line + 1}"
