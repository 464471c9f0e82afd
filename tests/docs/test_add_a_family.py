"""The guide works: its description of a family passes every check."""

import re
from pathlib import Path

import pytest

from frugallm.conformance.families import CHECKS
from frugallm.conformance.outcome import CheckFailed
from frugallm.models import family

GUIDE = Path(__file__).parents[2] / "docs" / "add-a-family.md"


def description_and_check():
    return re.findall(r"^```python\n(.*?)\n```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_description_passes_every_check(monkeypatch, capsys):
    description, check = description_and_check()
    space = {}
    exec(description, space)
    monkeypatch.setattr(family, "FAMILIES", (*family.FAMILIES, space["STARCODER2"]))
    exec(check, space)
    assert capsys.readouterr().out.count("passed:") == len(CHECKS)


def test_a_wrong_description_fails_with_what_it_misses(monkeypatch):
    description, check = description_and_check()
    space = {}
    exec(description.replace('"self_attn.k_proj", ', ""), space)
    monkeypatch.setattr(family, "FAMILIES", (*family.FAMILIES, space["STARCODER2"]))
    with pytest.raises(CheckFailed, match="k_proj"):
        exec(check, space)


def test_an_illegal_fold_is_found(monkeypatch):
    description, check = description_and_check()
    space = {}
    exec(description.replace(', through="hidden_act"', ""), space)
    monkeypatch.setattr(family, "FAMILIES", (*family.FAMILIES, space["STARCODER2"]))
    with pytest.raises(CheckFailed, match="logits moved"):
        exec(check, space)
