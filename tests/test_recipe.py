import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugallm.catalogue import find_method
from frugallm.errors import ParameterError, RecipeError
from frugallm.recipe import Recipe, presets
from frugallm.step_syntax import format_step, parse_step

TOY = str(Path(__file__).parent / "toy_method.py")
Toy = find_method(TOY)

text = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
toys = st.builds(
    Toy,
    bits=st.sampled_from([2, 3, 4, 8]),
    alpha=st.floats(0, allow_infinity=False),
    symmetric=st.booleans(),
    label=st.none() | text,
    skip=st.lists(text | st.just("*.layers.[0-3].mlp.down_proj"), max_size=3),
)


@pytest.mark.parametrize(
    ("step", "name", "parameters"),
    [
        ("gptq", "gptq", {}),
        ("gptq:", "gptq", {}),
        ("gptq:bits=4,group_size=64", "gptq", {"bits": 4, "group_size": 64}),
        ("x:a=-3,b=.5,c=1e-3,d=2.", "x", {"a": -3, "b": 0.5, "c": 0.001, "d": 2.0}),
        ("x:a=true,b=False,c=null,d=None", "x", {"a": True, "b": False, "c": None, "d": None}),
        ("x:a=fast,b='true',c=\"4\"", "x", {"a": "fast", "b": "true", "c": "4"}),
        ("x:s=[*.layers.11.mlp.down_proj,*.o_proj]", "x", {"s": ["*.layers.11.mlp.down_proj", "*.o_proj"]}),
        ("x:s=[\"*.a,b\", '*.c' ],n=1", "x", {"s": ["*.a,b", "*.c"], "n": 1}),
        ("x:s=[],t=[[1,2],[3]]", "x", {"s": [], "t": [[1, 2], [3]]}),
        ("x:s=[layers.[0-3].*,b],p=[0-9]x", "x", None),
        ("x:s=[layers.[0-3].*,b],p=*[0-9]x", "x", {"s": ["layers.[0-3].*", "b"], "p": "*[0-9]x"}),
        ("x:pattern=2:4,n=1", "x", {"pattern": "2:4", "n": 1}),
        ("./my/method.py:bits=3", "./my/method.py", {"bits": 3}),
    ],
)
def test_a_step_is_read_as_written(step, name, parameters):
    if parameters is None:
        with pytest.raises(RecipeError):
            parse_step(step)
    else:
        assert parse_step(step) == (name, parameters)


@pytest.mark.parametrize(
    "step",
    ["", ":bits=4", "x:bits", "x:=4", "x:a=1,a=2", "x:a=[1,2", "x:a=]", 'x:a="b', "x:a='b", "x:a=,b=1"],
)
def test_a_malformed_step_is_refused_in_one_line(step):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse([step])
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), values, max_size=4))
def test_format_and_parse_are_inverse(parameters):
    assert parse_step(format_step("x", parameters)) == ("x", parameters)


@given(st.lists(toys, min_size=1, max_size=3))
def test_python_cli_and_yaml_are_the_same_recipe(tmp_path_factory, steps):
    recipe = Recipe(steps=steps)
    from_cli = Recipe.parse(recipe.to_cli())
    file = tmp_path_factory.mktemp("recipe") / "r.yaml"
    for defaults in (False, True):
        file.write_text(from_cli.to_yaml(defaults), encoding="utf-8")
        from_yaml = Recipe.load(file)
        assert from_yaml == from_cli == recipe
        assert from_yaml.digest() == from_cli.digest() == recipe.digest()
        assert hash(from_yaml) == hash(recipe)
    assert pickle.loads(pickle.dumps(from_yaml)) == recipe


def test_a_ratio_is_no_number_to_the_base_of_60(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("steps:\n  - magnitude: {pattern: 2:4}\n  - rtn: {bits: 4, skip: ['*.0:1']}\n")
    recipe = Recipe.load(file)
    assert recipe.steps[0].pattern == "2:4" and recipe.steps[1].bits == 4
    assert recipe.to_cli()[0] == "magnitude:pattern=2:4"
    file.write_text(recipe.to_yaml())
    assert Recipe.load(file) == recipe == Recipe.parse(recipe.to_cli())


def test_settings_write_out_the_defaults_and_the_digest_depends_on_nothing_else(tmp_path):
    recipe = Recipe.parse([f"{TOY}:bits=3"])
    expected = {"bits": 3, "alpha": 0.5, "symmetric": True, "label": None, "skip": []}
    assert recipe.settings() == [{"toy_method": expected}]
    assert Recipe.parse([f"{TOY}:alpha=0.5,bits=3"]).digest() == recipe.digest()
    assert Recipe.parse([f"{TOY}:bits=4"]).digest() != recipe.digest()
    assert Recipe(steps=recipe.steps, title="another").digest() == recipe.digest()
    assert recipe.versions() == {"toy_method": Toy.version()}
    moved = tmp_path / "toy_method.py"
    moved.write_bytes(Path(TOY).read_bytes())
    assert Recipe.parse([f"{moved}:bits=3"]).digest() == recipe.digest()


def test_of_takes_whatever_names_a_recipe(tmp_path):
    recipe = Recipe.parse([f"{TOY}:bits=3"])
    file = tmp_path / "r.yaml"
    file.write_text(recipe.to_yaml())
    given_as = [recipe, file, str(file), Toy(bits=3), [Toy(bits=3)], [f"{TOY}:bits=3"]]
    assert all(Recipe.of(steps) == recipe for steps in given_as)


def test_a_path_in_a_file_starts_at_the_file(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_bytes(Path(TOY).read_bytes())
    (tmp_path / "r.yaml").write_text("steps:\n- ./mine.py: {bits: 2}\n")
    assert Recipe.load(tmp_path / "r.yaml").settings()[0]["mine"]["bits"] == 2
    monkeypatch.chdir(tmp_path)
    assert Recipe.parse(["./mine.py:bits=2"]) == Recipe.load("r.yaml")


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("steps:\n- TOY:\n    bits: 5\n", "bits must be 2, 3, 4 or 8; got 5 (FILE, line 3)"),
        ("steps:\n- TOY\n- TOY: {alfa: 1}\n", "no parameter 'alfa' (FILE, line 3). did you mean 'alpha'?"),
        ("steps:\n- TOY: 4\n", "parameters must be a mapping (FILE, line 2)"),
        ("steps:\n- TOY: {bits: 3, bits: 4}\n", "'bits' is given twice or is no word (FILE, line 2)"),
        ("steps:\n- {a: {}, b: {}}\n", "a step must be one method (FILE, line 2)"),
        ("steps:\n- TOY\nstep: 1\n", "a recipe has no key 'step' (FILE, line 3). did you mean 'steps'?"),
        ("steps: []\n", "FILE: a recipe needs at least one step"),
        ("title: x\n", "FILE: a recipe needs at least one step"),
        ("steps: 3\n", "'steps' must be a list (FILE, line 1)"),
        ("- TOY\n", "FILE: a recipe is a mapping with the key 'steps'"),
        ("", "FILE: a recipe is a mapping with the key 'steps'"),
        ("steps:\n- TOY: {skip: [*.o_proj]}\n", "FILE, line 2: not valid YAML"),
        ("steps:\n\t- x\n", "FILE, line 2: not valid YAML"),
        ("steps:\n- TOY: {label: 2001-99-99}\n", "cannot read a value (FILE, line 2)"),
        ("title: [1]\nsteps: [TOY]\n", "recipe: title"),
        ("steps: [no_such_method]\n", "there is no method 'no_such_method' (FILE, line 1)"),
    ],
)
def test_an_error_in_a_file_names_the_line(tmp_path, yaml, says):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.replace("TOY", TOY))
    with pytest.raises((RecipeError, ParameterError)) as caught:
        Recipe.load(file)
    assert says.replace("FILE", str(file)) in str(caught.value)
    assert caught.value.status == 2


def test_an_error_in_a_step_names_its_position():
    with pytest.raises(ParameterError, match=r"bits must be 2, 3, 4 or 8; got 5 \(step 2\)"):
        Recipe.parse([TOY, f"{TOY}:bits=5"])
    with pytest.raises(RecipeError, match=r"there is no method 'qptx' \(step 1\)"):
        Recipe.parse(["qptx"])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("w4a61", "did you mean 'w4a16'?"),
        ("no/such.yaml", "no recipe file no/such.yaml"),
        (".", "cannot read"),
    ],
)
def test_a_missing_recipe_is_refused(source, says):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(source)
    assert says in str(caught.value)


def test_a_binary_recipe_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        Recipe.load(tmp_path / "r.yaml")


def test_a_recipe_needs_methods():
    with pytest.raises(RecipeError, match="at least one step"):
        Recipe(steps=[])
    with pytest.raises(RecipeError, match="steps"):
        Recipe(steps=["gptq"])
    with pytest.raises(RecipeError, match="at least one step"):
        Recipe.parse([])


def test_every_preset_opens_with_its_reason():
    assert presets()
    assert all(file.read_text().startswith("# ") for file in presets().values())
