import json
import shutil
from pathlib import Path

import pytest

from frugallm import pages
from frugallm.catalogue import find_method, methods
from frugallm.cli import doctor
from frugallm.cli.main import app, main
from frugallm.cli.reference import command_page
from frugallm.cli.run import read_recipe, resume_command
from frugallm.recipe import Recipe

ROOT = Path(__file__).parents[2]


def test_methods_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 100
    assert rows[0]["id"] == "q-gptq" and rows[-1]["id"] == "x-llm-foundry"
    assert all({"id", "section", "kind", "name", "state", "methods", "claim"} <= row.keys() for row in rows)
    assert {row["state"] for row in rows} <= {"works", "preview", "planned"}
    gptq = rows[0]["methods"][0]
    assert gptq["name"] == "gptq" and {"name", "state", "claim"} <= gptq.keys()


def test_methods_as_a_table(capsys):
    assert main(["methods", "--section", "low-rank approx"]) == 0
    shown = capsys.readouterr().out
    assert "l-tensorgpt" in shown and "q-gptq" not in shown
    assert "2 planned" in shown
    assert main(["methods"]) == 0
    rest = ", ".join(name for name, method in methods().items() if not method.card.row)
    assert "rtn" in rest and f"Without a row of their own: {rest}" in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_steps_and_a_recipe_file_add_up(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("title: t\nsteps: [rtn]\n")
    both = read_recipe(["embedding"], str(file))
    assert [step.name() for step in both.steps] == ["rtn", "embedding"]
    assert both.title == "t"
    assert read_recipe([], str(file)) == Recipe.load(file)


def test_every_preset_loads():
    from frugallm.recipe import presets

    loaded = {name: Recipe.load(name) for name in presets()}
    assert {"w4a16", "w3a16", "w8a8", "w8a8-dynamic"} <= set(loaded)
    assert loaded["w4a16"].to_cli() == ["gptq", "embedding"]
    assert all(recipe.title and recipe.why for recipe in loaded.values())


def test_the_command_that_continues_is_the_same_with_resume():
    given = ["run", "m", "gptq:skip=[*.o_proj]", "--out", "my dir", "--overwrite"]
    assert resume_command(given) == "frugal run m 'gptq:skip=[*.o_proj]' --out 'my dir' --resume"
    assert resume_command(["run", "m", "rtn", "--resume"]) == "frugal run m rtn --resume"


def test_inspect_shows_parts_and_methods(capsys):
    assert main(["inspect", "smollm2-135m"]) == 0
    shown = capsys.readouterr().out
    assert "30 blocks, head tied to the embedding" in shown
    assert "134,515,008" in shown
    assert "16, 24, 32, 48, 64, 96, 192" in shown
    for name in methods():
        assert f"  {name}" in shown


def test_new_writes_a_method_that_recipes_can_use(tmp_path, capsys):
    assert main(["new", "quantize", "my_idea", "--to", str(tmp_path)]) == 0
    path = tmp_path / "my_idea.py"
    assert str(path) in capsys.readouterr().out
    method = find_method(str(path))
    assert method.__name__ == "MyIdea" and method.name() == "my_idea"
    recipe = Recipe.parse([f"{path}:bits=3"])
    assert Recipe.parse(recipe.to_cli()) == recipe
    assert "{" not in method.card.title
    assert "## Idea" in pages.method_page(method)
    assert main(["new", "quantize", "my_idea", "--to", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err


def test_every_family_with_methods_has_a_skeleton():
    from frugallm.skeleton import families, skeleton

    for family in families():
        assert "class AIdea(" in skeleton(family, "a_idea")


def test_docs_are_written_once_and_checked(tmp_path, capsys):
    assert main(["docs", "--to", str(tmp_path)]) == 0
    written = {Path(line).relative_to(tmp_path).as_posix() for line in capsys.readouterr().out.splitlines()}
    assert written == {"cli.md", "methods/README.md", *(f"methods/{name}.md" for name in methods())}
    assert main(["docs", "--to", str(tmp_path), "--check"]) == 0
    (tmp_path / "methods" / "gone.md").write_text("old")
    (tmp_path / "cli.md").write_text("edited")
    assert main(["docs", "--to", str(tmp_path), "--check"]) == 2
    shown = capsys.readouterr().err
    assert "gone.md" in shown and "cli.md" in shown
    assert main(["docs", "--to", str(tmp_path)]) == 0
    assert not (tmp_path / "methods" / "gone.md").exists()


def test_the_pages_in_the_repository_are_up_to_date():
    every = {"cli.md": command_page(app), **pages.method_pages()}
    assert pages.stale(every, ROOT / "docs") == [], "run: frugal docs"


def test_a_method_page_holds_parameters_and_sections():
    page = pages.method_page(methods()["gptq"])
    for field in methods()["gptq"].model_fields:
        assert f"| `{field}` |" in page
    for heading in ("Idea", "Formula", "When to use it", "Cost", "Differences from the paper", "References"):
        assert f"\n## {heading}\n" in page
    assert "| `damp` | `0.01` | number, ≥ 0, ≤ 1 |" in page
    assert "arxiv.org/abs/2210.17323" in page


@pytest.mark.parametrize(
    ("docstring", "page"),
    [
        ("Idea\n----\nUse ``x``.", "## Idea\n\nUse `x`."),
        ("Let::\n\n    a = b\n\n      c\n\nThen", "Let:\n\n```text\na = b\n\n  c\n```\n\nThen"),
        ("Let::\n\n    a = b", "Let:\n\n```text\na = b\n```"),
    ],
)
def test_a_docstring_becomes_markdown(docstring, page):
    assert pages.markdown(docstring) == page


def test_the_pins_travel_with_the_package():
    assert (ROOT / "src/frugallm/pins.txt").read_bytes() == (ROOT / "constraints.txt").read_bytes()
    assert doctor.pins()["torch"] == "2.13.0"
    assert doctor.installed("no-such-package") is None


def test_a_recipe_file_next_to_a_method_of_your_own(tmp_path):
    shutil.copy(Path(__file__).parents[1] / "toy_method.py", tmp_path / "toy.py")
    (tmp_path / "r.yaml").write_text("steps:\n- ./toy.py: {bits: 3}\n- rtn: {only: ['*.o_proj']}\n")
    assert [step.name() for step in read_recipe([], str(tmp_path / "r.yaml")).steps] == ["toy", "rtn"]
