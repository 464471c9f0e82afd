import json
import shutil
from pathlib import Path

import pytest

from frugallm import catalogue
from frugallm.catalogue import Conformance, find_method, methods, rows, survey, write_record
from frugallm.errors import FrugalError, RecipeError
from frugallm.method import Claim, Method

TOY = Path(__file__).parent / "toy_method.py"
PASSED = Conformance(passed=1, checks=("a",), date="2026-11-22", versions={"torch": "2.13.0"})
HELD = Claim(metric="kl", value=1.0, baseline="rtn", baseline_value=2.0, passed=True, model="m")


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "RECORDS", tmp_path / "records")
    return tmp_path / "records"


def test_the_survey_has_a_hundred_rows_in_its_order():
    kinds = [row.kind for row in rows()]
    assert [kinds.count(k) for k in ("paper", "category", "framework")] == [48, 38, 14]
    assert len({row.id for row in rows()}) == 100
    numbers = [[int(n) for n in row.section.split(" ")[0].split(".")] for row in rows()]
    assert numbers == sorted(numbers)
    assert all(row.summary.endswith(".") and row.name for row in rows())


def test_methods_are_found_by_file_and_fill_rows_that_exist():
    assert {"rtn", "gptq", "smoothquant", "embedding"} <= set(methods())
    for name, method in methods().items():
        assert issubclass(method, Method)
        assert method.name() == name
        assert find_method(name) is method
        assert method.card.row in {"", *(row.id for row in rows())}


def test_parts_of_a_family_are_no_methods():
    assert "grids" not in methods()
    with pytest.raises(RecipeError, match="no method 'grids'"):
        find_method("grids")


def test_a_file_outside_the_package_is_a_method(tmp_path):
    assert find_method(str(TOY)).__name__ == "ToyMethod"
    assert find_method(str(TOY)) is find_method(TOY.name, TOY.parent)
    shutil.copy(TOY, tmp_path / "mine.py")
    assert find_method("mine.py", tmp_path).name() == "mine"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read the method"),
        ("x = 1\n", "holds no method"),
        ("x = \n", "line 1: invalid syntax"),
        ("import frugallm.nothing\n", "No module named 'frugallm.nothing'"),
        (TOY.read_text() + "\n\nclass B(ToyMethod):\n    card = ToyMethod.card\n", "holds several methods"),
    ],
)
def test_a_file_that_is_no_method_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "bad.py").write_text(content)
    with pytest.raises(RecipeError, match=says):
        find_method("bad.py", tmp_path)


def state_of(row):
    return next(entry for entry in survey() if entry.id == row)


def test_a_row_works_only_with_both_records_of_the_current_version(records):
    gptq = methods()["gptq"]
    assert state_of("q-gptq").state == "preview"
    assert state_of("p-llm-pruner").state == "planned"
    write_record(gptq, conformance=PASSED)
    assert state_of("q-gptq").state == "preview"
    write_record(gptq, claim=HELD)
    entry = state_of("q-gptq")
    assert entry.state == "works"
    assert entry.methods[0].name == "gptq"
    assert entry.claim == entry.methods[0].claim
    assert entry.claim["value"] == 1.0 and "reason" not in entry.claim

    record = json.loads((records / "gptq.json").read_text())
    (records / "gptq.json").write_text(json.dumps(record | {"version": "of-old"}))
    stale = state_of("q-gptq")
    assert stale.state == "preview" and stale.claim is None


def test_a_failed_claim_keeps_its_reason_and_the_row_works(records):
    failed = HELD.model_copy(update={"passed": False, "reason": "too small a model"})
    write_record(methods()["gptq"], conformance=PASSED, claim=failed)
    entry = state_of("q-gptq")
    assert entry.state == "works"
    assert entry.claim["passed"] is False and entry.claim["reason"] == "too small a model"


def test_a_record_of_another_version_is_not_mixed_with_a_new_one(records):
    gptq = methods()["gptq"]
    write_record(gptq, conformance=PASSED)
    record = json.loads((records / "gptq.json").read_text())
    (records / "gptq.json").write_text(json.dumps(record | {"version": "of-old"}))
    write_record(gptq, claim=HELD)
    assert catalogue.read_record("gptq").conformance is None
    assert state_of("q-gptq").state == "preview"


def test_a_conformance_record_without_a_passed_check_is_none(records):
    write_record(methods()["gptq"], conformance=PASSED.model_copy(update={"passed": 0}), claim=HELD)
    assert state_of("q-gptq").state == "preview"


def test_sections_are_chosen_by_text():
    assert {entry.section for entry in survey("1.1.1")} == {r.section for r in rows() if "1.1.1" in r.section}
    assert {entry.id for entry in survey("low-rank appr")} == {"l-tensorgpt", "l-losparse"}
    with pytest.raises(FrugalError, match=r"no section '9\.9'"):
        survey("9.9")


def test_shipped_records_belong_to_methods():
    for path in sorted(catalogue.RECORDS.glob("*.json")):
        assert catalogue.read_record(path.stem).method == path.stem
        assert path.stem in methods()
