import json
import sys
from types import SimpleNamespace

import pytest

from finished_run import Heard
from frugallm import catalogue
from frugallm.catalogue import methods, read_record
from frugallm.errors import ParameterError
from frugallm.method import Claim
from frugallm.reproduce import able, reproduce, results_page

BENCH = SimpleNamespace(model_name="org/m", checkpoint=SimpleNamespace(digest=lambda: "0" * 64))


@pytest.fixture
def claims(monkeypatch, tmp_path):
    """Two methods whose claims need no model: one holds, one does not."""
    held = Claim(metric="kl", value=0.5, baseline="rtn W3", baseline_value=0.9, passed=True, model="org/m")
    failed = held.model_copy(update={"value": 1.1, "passed": False, "reason": "too small a model"})
    for name, claim in {"gptq": held, "smoothquant": failed}.items():
        monkeypatch.setattr(methods()[name], "claim", classmethod(lambda cls, bench, claim=claim: claim))
    monkeypatch.setattr(catalogue, "RECORDS", tmp_path / "records")
    machine = SimpleNamespace(machine=lambda: {"processor": "p"})
    monkeypatch.setitem(sys.modules, "frugallm.evaluate.machine", machine)
    return [methods()["gptq"], methods()["smoothquant"]]


def test_each_claim_is_written_and_tabled_whatever_came_out(claims, tmp_path):
    folder = tmp_path / "results"
    assert [r.method for r in reproduce(claims, BENCH, folder)] == ["gptq", "smoothquant"]
    stored = json.loads((folder / "org--m" / "gptq.json").read_text())
    assert stored["claim"]["value"] == 0.5
    assert stored["version"] == methods()["gptq"].version()
    assert stored["machine"] == {"processor": "p"} and "torch" in stored["versions"]
    (folder / "org--m" / "other.json").write_text('{"perplexity": 17.0}')
    page = results_page(folder)
    assert "## org/m" in page
    assert "| kl 0.5 | 0.9 (rtn W3) | held |" in page
    assert "| kl 1.1 | 0.9 (rtn W3) | not held: too small a model |" in page
    assert "earlier code" not in page
    assert read_record("gptq") is None


def test_what_cannot_be_checked_here_is_left_out_or_refused_if_named(monkeypatch):
    monkeypatch.setattr(methods()["gptq"], "claim_needs", classmethod(lambda cls: "a quantum processor"))
    both, heard = [methods()["gptq"], methods()["rtn"]], Heard()
    assert able(both, False, heard) == [methods()["rtn"]]
    [(kind, facts)] = heard.events
    assert kind == "note" and "gptq is left out: its claim needs a quantum processor" in facts["text"]
    assert able([methods()["rtn"]], True, heard) == [methods()["rtn"]]
    with pytest.raises(ParameterError, match="gptq needs a quantum processor"):
        able(both, True, heard)


def test_a_result_of_earlier_code_is_marked(claims, tmp_path):
    list(reproduce(claims[:1], BENCH, tmp_path / "results"))
    path = tmp_path / "results" / "org--m" / "gptq.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "of-old"}))
    assert "| held (earlier code) |" in results_page(tmp_path / "results")


def test_on_request_the_claim_becomes_the_record(claims, tmp_path):
    list(reproduce(claims, BENCH, tmp_path / "results", record=True))
    assert read_record("gptq").claim.passed is True
    assert read_record("smoothquant").claim.reason == "too small a model"
