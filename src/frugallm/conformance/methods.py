"""What every method must pass, whatever its family: file, card, parameters, life as a value."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from frugallm.catalogue import rows
from frugallm.conformance.examples import other_values, variants, wrong_values
from frugallm.conformance.outcome import Check, CheckFailed, ensure
from frugallm.conformance.trial import Trial
from frugallm.errors import ParameterError
from frugallm.method import Method, source_file
from frugallm.recipe import Recipe

SECTIONS = ("Idea", "Formula", "When to use it", "Cost", "Differences from the paper", "References")
#: Seconds that importing a method may take once torch and the contract of its family are there.
IMPORT_SECONDS = 0.1
MAX_LINES = 400


def checks(method: type[Method]) -> list[Check]:
    """Return the checks for any method."""
    return [
        the_file_is_named_after_the_class,
        the_card_is_complete,
        the_docstring_has_all_sections,
        the_file_is_short,
        every_parameter_is_described,
        the_defaults_construct,
        a_wrong_value_is_refused_by_name,
        a_misspelt_parameter_suggests_the_right_one,
        an_instance_is_frozen,
        equal_parameters_are_equal_and_hash_alike,
        recipes_give_the_same_method_back,
        pickle_gives_the_same_method_back,
        the_claim_is_written,
        the_import_is_fast,
    ]


def the_file_is_named_after_the_class(trial: Trial) -> None:
    """``SmoothQuant`` lives in ``smoothquant.py``, with or without underscores."""
    stem, wanted = trial.method.name().replace("_", ""), trial.method.__name__.lower().replace("_", "")
    ensure(stem == wanted, f"class {trial.method.__name__} lives in {trial.method.name()}.py")


def the_card_is_complete(trial: Trial) -> None:
    """Title, summary, baseline and claim; the paper's facts where the method fills a row of the survey."""
    card = trial.method.card
    wanted = ["title", "summary", "baseline", "claim"]
    if card.row:
        ensure(card.row in {row.id for row in rows()}, f"the survey has no row '{card.row}'")
        wanted += ["paper", "authors", "year", "venue", "arxiv"]
    if not card.holds:
        wanted.append("reason")
    missing = [name for name in wanted if not getattr(card, name)]
    ensure(not missing, f"the card lacks {', '.join(missing)}")
    ensure("\n" not in card.summary, "the summary is longer than a line")


def the_docstring_has_all_sections(trial: Trial) -> None:
    """The module explains idea, formula, use, cost and differences, and gives references."""
    lines = (inspect.getdoc(sys.modules[trial.method.__module__]) or "").splitlines()
    ensure(bool(lines), "the module has no docstring")
    headings = [line for line, rule in pairwise(lines) if rule and set(rule) == {"-"}]
    missing = [section for section in SECTIONS if section not in headings]
    ensure(not missing, f"the module's docstring lacks {', '.join(missing)}")
    order = [heading for heading in headings if heading in SECTIONS]
    ensure(order == list(SECTIONS), f"the docstring's sections stand as {', '.join(order)}")


def the_file_is_short(trial: Trial) -> None:
    """A method is one idea."""
    count = len(source_file(trial.method).read_text(encoding="utf-8").splitlines())
    ensure(count <= MAX_LINES, f"the file has {count} lines; {MAX_LINES} are enough")


def every_parameter_is_described(trial: Trial) -> None:
    """Each has a type and one line of meaning, and a number has a range or choices."""
    for name, field in trial.method.model_fields.items():
        ensure(field.annotation not in (None, Any), f"{name} has no type")
        ensure(bool(field.description), f"{name} has no description")
        if field.annotation in (int, float, int | None, float | None):
            ensure(bool(field.metadata), f"{name} is a number without a range")


def the_defaults_construct(trial: Trial) -> None:
    """A method without parameters is usable."""
    ensure(trial.method().changed() == {}, f"the defaults are not the defaults: {trial.method().changed()}")


def a_wrong_value_is_refused_by_name(trial: Trial) -> None:
    """A wrong type, a value out of range or an unknown choice names method and parameter."""
    method = trial.method
    for name in method.model_fields:
        for value in wrong_values(method, name):
            try:
                method(**{name: value})
            except ParameterError as error:
                named = method.name() in error.message and name in error.message
                ensure(named, f"{name}={value!r}: the error names not both method and parameter: {error}")
            else:
                raise CheckFailed(f"{name}={value!r} is taken")


def a_misspelt_parameter_suggests_the_right_one(trial: Trial) -> None:
    """``bit=4`` is refused, and ``bits`` offered."""
    for name in trial.method.model_fields:
        try:
            trial.method(**{f"{name}x": 1})
        except ParameterError as error:
            ensure(f"'{name}'" in error.hint, f"{name}x: the hint does not offer '{name}': {error}")
        else:
            raise CheckFailed(f"an unknown parameter {name}x is taken")


def an_instance_is_frozen(trial: Trial) -> None:
    """Parameters cannot be changed, and nothing can be added."""
    one = trial.method()
    for name in [*trial.method.model_fields, "something_new"]:
        try:
            setattr(one, name, getattr(one, name, 1))
        except (ValidationError, AttributeError, TypeError):
            continue
        raise CheckFailed(f"{name} can be set on an instance")


def equal_parameters_are_equal_and_hash_alike(trial: Trial) -> None:
    """Two methods with the same parameters are one value; any other parameter makes another."""
    method = trial.method
    ensure(method() == method() and hash(method()) == hash(method()), "two defaults differ")
    for name, value in variants(method):
        one, two = method(**{name: value}), method(**{name: value})
        ensure(one == two and hash(one) == hash(two), f"two with {name}={value!r} differ")
        ensure(one != method(), f"{name}={value!r} makes no difference")


def _instances(method: type[Method]) -> list[Method]:
    every = {name: values[0] for name in method.model_fields if (values := other_values(method, name))}
    return [method(), method(**every), *(method(**{name: value}) for name, value in variants(method))]


def recipes_give_the_same_method_back(trial: Trial) -> None:
    """Python, command line and YAML are one recipe: equal, and with equal digests."""
    folder = trial.out()
    folder.mkdir()
    for number, one in enumerate(_instances(trial.method)):
        recipe = Recipe(steps=[one])
        file = folder / f"{number}.yaml"
        ways = {"the command line": lambda recipe=recipe: Recipe.parse(recipe.to_cli())}
        for defaults in (False, True):
            file.write_text(recipe.to_yaml(defaults=defaults), encoding="utf-8")
            back = Recipe.load(file)
            ways[f"YAML with defaults={defaults}"] = lambda back=back: back
        for way, read in ways.items():
            same = read().steps == recipe.steps and read().digest() == recipe.digest()
            ensure(same, f"{recipe.to_cli()} comes back changed from {way}: {read().to_cli()}")


def pickle_gives_the_same_method_back(trial: Trial) -> None:
    """Methods may travel between processes."""
    for one in _instances(trial.method):
        ensure(pickle.loads(pickle.dumps(one)) == one, f"{one!r} comes back changed")


def the_claim_is_written(trial: Trial) -> None:
    """A method without a claim check does not exist."""
    ensure("claim" in vars(trial.method), "the class does not define claim()")


def the_import_is_fast(trial: Trial) -> None:
    """Whatever is heavy is imported by the function that needs it."""
    code = (
        "import sys, time, importlib, importlib.util\n"
        "import torch, pydantic, frugallm.compress.contract, frugallm.compress.quantize.solvers\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "spec = importlib.util.spec_from_file_location('method_on_trial', sys.argv[1])\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print(time.process_time() - start, *sorted(m for m in set(sys.modules) - before if '.' not in m))\n"
    )
    path = str(source_file(trial.method))
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    ensure(done.returncode == 0, f"cannot be imported alone: {done.stderr.strip().splitlines()[-1:]}")
    seconds, *modules = done.stdout.split()
    brought = f" and brings {', '.join(modules)}" if modules else ""
    ensure(float(seconds) <= IMPORT_SECONDS, f"importing takes {float(seconds):.2f} s{brought}")
