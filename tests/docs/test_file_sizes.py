"""The parts of the benchmark of whole files that can be held against something without a model."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OWN = ("file_sizes", "arms", "harness", "peers", "setting")


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import file_sizes

    yield file_sizes
    for name in OWN:
        sys.modules.pop(name, None)


def weights(*megabytes):
    return [{"compared_bytes": round(1e6 * one)} for one in megabytes]


def evaluation(name, kl, nll):
    kl, nll = [kl, 1.1 * kl, 0.9 * kl], [nll, nll + 0.1, nll - 0.1]
    figures = {"kl": SimpleNamespace(value=sum(kl) / 3), "perplexity": SimpleNamespace(value=sum(nll) / 3)}
    return SimpleNamespace(model=name, kl_per_window=kl, nll_per_window=nll, **figures)


OURS, OTHER = "frugallm 90 MB mixed gptq", "frugallm 90 MB mixed gptaq"
Q4, IQ4, HQQ = "llama.cpp Q4_0, imatrix", "gguf IQ4_NL imatrix", "hqq W2, groups of 64"
AUTO = "autoround W2, groups of 32"


def test_ours_of_a_size_is_the_closest_that_is_small_enough(sizes):
    large = "frugallm 90 MB mixed gptq, table in 4 bits"
    runs = dict(zip((OURS, OTHER, large), weights(89.0, 88.9, 89.2), strict=True))
    assert sizes.choose({OURS: 0.3, OTHER: 0.2, large: 0.1}, runs) == {90: OTHER}
    assert sizes.choose({large: 0.1}, runs) == {}


def test_peers_are_no_smaller_and_at_most_three_per_cent_larger(sizes):
    runs = dict(zip((OURS, OTHER, Q4, IQ4, HQQ), weights(88, 88.5, 88, 90.6, 90.7), strict=True))
    found = sizes.in_range(OURS, runs)
    assert found == {"llama.cpp": [Q4, IQ4], "hqq": []}  # the others did not run
    assert sizes.in_range(OTHER, runs) == {"llama.cpp": [IQ4], "hqq": [HQQ]}


def test_the_best_file_of_each_toolkit_is_the_peer(sizes):
    runs = dict(zip((OURS, Q4, IQ4, HQQ, AUTO), weights(88, 88, 89, 89, 95), strict=True))
    told = {AUTO: (0.0, 2.0), OURS: (0.2, 3.0), Q4: (0.3, 3.2), IQ4: (0.4, 3.1), HQQ: (0.1, 2.9)}
    found, alone = sizes.verdicts({90: OURS}, runs, {n: evaluation(n, *told[n]) for n in runs})
    passed = {words: (verdict["peer"], verdict["passed"]) for words, verdict in found.items()}
    assert passed == {
        "90 MB: KL below llama.cpp's at no fewer bytes": (Q4, True),
        "90 MB: perplexity below llama.cpp's at no fewer bytes": (IQ4, True),
        "90 MB: KL below hqq's at no fewer bytes": (HQQ, False),
        "90 MB: perplexity below hqq's at no fewer bytes": (HQQ, False),
    }
    assert alone == ["90 MB: autoround"]


def test_every_arm_has_a_process_and_a_place_of_its_own(sizes):
    assert len({sizes.file_name(name) for name in sizes.ARMS}) == len(sizes.ARMS)
    scripts = {"llama.cpp": "python", "llm-compressor": "python", "hqq": "python", "autoround": "python"}
    place = {"model": "m", "gguf": "g.gguf", "tokens": "t", "importance": "i.npz", "pythons": scripts}
    setting = sizes.common.Setting(Path("data"))
    for name in sizes.ARMS:
        made = [str(part) for part in sizes.command(name, place, Path("out"), setting)]
        assert "out" in made and ("--importance=i.npz" in made) == (name[:5] == "llama" and "imatrix" in name)
        assert made[0] != "python" or Path(made[1]).is_file()


def test_budgets_leave_room_for_the_tables(sizes):
    assert float(sizes.budget(90, 8)) + sizes.TABLES[8] / 1e6 == pytest.approx(88.7, abs=0.01)
    assert float(sizes.budget(90, 4)) - float(sizes.budget(90, 4, 2)) == pytest.approx(15.04, abs=0.01)
