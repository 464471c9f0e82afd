"""The guide works: its code blocks make a method, and its commands check it, run it and measure it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from frugallm.catalogue import find_method
from frugallm.cli.main import main
from frugallm.models import load
from frugallm.recipe import Recipe

GUIDE = Path(__file__).parents[2] / "docs" / "add-a-method.md"


def blocks(kind):
    return re.findall(
        rf"^```{kind}\n(.*?)\n```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(beginning):
    found = [line for block in blocks("sh") for line in block.splitlines() if line.startswith(beginning)]
    assert found, f"the guide has no line that begins with {beginning}"
    return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder in which the reader has followed the guide up to the recipe."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("desk")
        patch.chdir(folder)
        assert main(shlex.split(commands("frugal new")[0])[1:]) == 0
        (folder / "clip.py").write_text("\n\n".join(blocks("python")) + "\n")
        (folder / "clip.yaml").write_text(blocks("yaml")[0])
        yield folder


def follow(line, model):
    """Carry out a command of the guide, on another model than the one it names."""
    arguments = [str(model) if word.startswith("smollm2-135m") else word for word in shlex.split(line)[1:]]
    assert main(arguments) == 0


def test_the_method_passes_every_check(desk, capsys):
    before, after = commands("frugal check")
    assert before == after
    follow(after, "")
    shown = capsys.readouterr().out
    passed = re.search(r"clip: (\d+) of (\d+) checks passed", shown)
    assert passed is not None and passed[1] == passed[2] and int(passed[1]) >= 25


def test_the_method_is_as_short_as_promised(desk):
    code = [line for block in blocks("python")[1:] for line in block.splitlines()]
    assert sum(bool(line.strip()) for line in code) <= 65
    assert max(map(len, (desk / "clip.py").read_text().splitlines())) <= 120


def test_recipe_file_and_python_are_the_same_thing(desk):
    names = {}
    exec(blocks("py")[0], names)
    assert names["recipe"].digest() == Recipe.load("clip.yaml").digest()
    assert Recipe.parse(["./clip.py:bits=3", "embedding:bits=8"]).digest() == names["recipe"].digest()


def test_the_run_ends_in_a_folder_that_loads(desk, trained_folder, capsys):
    follow(commands("frugal run")[0], trained_folder)
    assert "transformers:" in capsys.readouterr().out
    manifest = json.loads((desk / "runs/clip/manifest.json").read_text())
    assert manifest["job"]["recipe"][0]["clip"]["bits"] == 3
    model, tokenizer = load(desk / "runs/clip")
    assert model(**tokenizer("The list is sorted", return_tensors="pt")).logits.isfinite().all()


@pytest.mark.claim
def test_the_claim_holds(desk, tiny_bench):
    claim = find_method("./clip.py").claim(tiny_bench)
    assert claim.passed, claim.reason
    assert claim.value < 0.9 * claim.baseline_value


@pytest.mark.claim
def test_the_claim_is_measured_and_written(desk, trained_folder):
    follow(commands("frugal reproduce")[0], trained_folder)
    (result,) = desk.glob("results/*/clip.json")
    assert json.loads(result.read_text())["claim"]["baseline"] == "rtn W3, same groups"
    assert "| Clip |" in (desk / "docs/results.md").read_text()
