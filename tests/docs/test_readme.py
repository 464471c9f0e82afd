"""The README says what is so: its tree, its three ways to say the same thing, its figures."""

import json
import re
import shlex
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import frugallm
from frugallm.catalogue import methods
from frugallm.cli.run import read_recipe
from frugallm.formats.engines import table
from frugallm.recipe import Recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Folders that exist once something has been measured.
MADE_LATER = {"results", "src/frugallm/records"}


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)\n```$", README, re.MULTILINE | re.DOTALL)


def printed_tree():
    """Return path → clause of every line of the printed tree."""
    tree = next(block for block in blocks("") if block.startswith("src/frugallm/"))
    parents, found = {}, {}
    for line in tree.splitlines():
        name, _, clause = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        path = f"{parents[depth - 1]}/{name}" if depth else name
        parents[depth] = path.rstrip("/")
        found[path] = clause.strip()
    return found


def folders(root):
    built = root / "kernels" / "native"  # what the build leaves beside the sources
    return {
        p.relative_to(ROOT).as_posix()
        for p in root.rglob("*")
        if p.is_dir()
        and built not in p.parents
        and p.name != "__pycache__"
        and any(f.is_file() for f in p.iterdir())
    }


def test_the_tree_is_that_of_the_folders():
    tree = printed_tree()
    shown = {path.rstrip("/") for path in tree if path.endswith("/")}
    package = ROOT / "src" / "frugallm"
    there = folders(package) | {"src/frugallm", "tests", "benchmarks", "docs"}
    assert there <= shown, "folders that README does not show"
    assert shown - there <= MADE_LATER, "folders that README shows and that are not there"
    modules = {f"src/frugallm/{p.name}" for p in package.glob("*.py") if p.name != "__init__.py"}
    assert {path for path in tree if path.endswith(".py")} == modules
    assert all(clause for path, clause in tree.items() if path != "src/frugallm/")


def test_every_link_leads_somewhere():
    for text in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").rglob("*.md"),
    ]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text.read_text(encoding="utf-8")):
            if not link.startswith(("http", "mailto:")):
                target = text.parent / link
                assert target.exists() or target.name == "quality_size.svg", f"{text.name}: {link}"


def test_the_three_ways_are_one_recipe(monkeypatch, tmp_path):
    line = next(
        line for block in blocks("sh") for line in block.splitlines() if line.startswith("frugal run")
    )
    words = shlex.split(line)
    shell = read_recipe([word for word in words[3:] if word not in ("--out", "runs/small")], None)
    seen = {}
    monkeypatch.setattr(frugallm, "run", lambda model, steps, out: seen.update(steps=steps), raising=False)
    exec(next(block for block in blocks("python") if "frugallm.run" in block), {})
    file = tmp_path / "recipe.yaml"
    file.write_text(blocks("yaml")[0])
    assert shell.digest() == Recipe.of(seen["steps"]).digest() == Recipe.load(file).digest()


def test_steps_in_the_guide_are_steps():
    guide = (ROOT / "docs" / "choose-a-method.md").read_text(encoding="utf-8")
    names = set(methods())
    quoted = [words.split() for words in re.findall(r"`([^`\n]+)`", guide)]
    steps = [words for words in quoted if words[0].partition(":")[0] in names]
    lines = re.findall(r"^frugal run MODEL (.*?) --", guide, re.MULTILINE)
    assert len(steps) > 20 and lines
    for written in [*steps, *(line.split() for line in lines)]:
        Recipe.parse([step.replace("…", "x") for step in written])


def test_the_commands_of_the_demo_and_the_tests_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    demo = re.search(r"`(frugal run smollm2-135m gptq[^`]*)`", README)[1]
    assert demo in makefile
    assert {"demo:", "test:", "dev:"} <= set(makefile.split())


def test_what_it_says_about_engines_is_what_the_table_says():
    assert {row.engine for row in table()} == set(
        re.findall(r"^\| (transformers|vLLM|llama\.cpp)", README, re.M)
    )
    ours = [row for row in table() if row.format == "compressed-tensors"]
    works = [row for row in ours if row.engine == "transformers" and row.seen != "no"]
    assert {(row.weights, row.tables, row.grids, row.modules) for row in works} == {
        ((2, 3, 4, 5, 6, 7, 8, 16), (16, 8), ("symmetric",), ("Linear",)),
        ((2, 3, 4, 5, 6, 7, 8), (16, 8), ("symmetric",), ("Linear",)),
        ((4,), (16, 8), ("mxfp4", "nvfp4"), ("Linear",)),
        ((8,), (16, 8), ("fp8",), ("Linear",)),
    }
    assert {t for row in table() if row.engine == "vLLM" for t in row.tables} == {16}
    on_a_gpu = [row for row in table() if row.engine == "vLLM" and row.device != "CPU"]
    assert on_a_gpu and all(row.seen == "documented" for row in on_a_gpu)
    assert yaml.safe_load((ROOT / "src/frugallm/formats/engines.yaml").read_text())


@pytest.fixture
def benchmarks(monkeypatch):
    """Lets modules of ``benchmarks/`` be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in ("readme_figures", "comparison"):
        sys.modules.pop(name, None)


@pytest.fixture
def readme_figures(benchmarks):
    import readme_figures

    return readme_figures


@pytest.fixture
def comparison(benchmarks):
    import comparison

    return comparison


def test_the_figures_are_those_of_the_results(readme_figures):
    section, picture = readme_figures.figures(ROOT / "results")
    stale = "run: python benchmarks/readme_figures.py"
    assert readme_figures.filled(README, section) == README, stale
    if picture is not None:
        assert (ROOT / "results" / readme_figures.PLOT).read_text() == picture, stale


def measured(perplexity, **more):
    figure = {"value": perplexity, "low": perplexity - 1, "high": perplexity + 1}
    kl, top1 = {"value": 0.1, "low": None, "high": None}, {"value": 0.8, "low": 0.7, "high": 0.9}
    return {"evaluation": {"perplexity": figure, "kl": kl, "top1": top1}, **more}


@pytest.fixture
def results(tmp_path):
    """Results as the benchmarks write them, with figures that nobody could take for measured ones."""
    facts = {"machine": {"cpu": "a processor"}, "date": "2001-01-01T00:00:00", "commit": "0123456789abcdef"}
    setting = {"model": "m", "samples": 1, "seq_len": 2, "windows": 3, "window_length": 4, "threads": 5}
    setting |= {"calibration": "c.txt", "evaluation": "e.txt"}
    cost = {
        "timed": True,
        "seconds": {"median": 7.0},
        "peak_anonymous": {"max": 2**30},
        "weights_bytes": 10**8,
    }
    ours, theirs = measured(20.0, **cost), measured(21.0, **cost | {"weights_bytes": 2 * 10**8})
    verdicts = {"time": {"peer": "p & q", "value": 0.5, "passed": False}}
    gptq = {"arms": {"frugallm x": ours, "llm-compressor <y>": theirs}, "verdicts": verdicts}
    smooth = {
        "arms": {"naive": measured(30.0, gap_closed=0.0), "smoothquant s": measured(22.0, gap_closed=0.9)}
    }
    for name, content in {
        "gptq_vs_llmcompressor": gptq,
        "smoothquant_static": smooth | {"passed": True},
    }.items():
        content = content | {"facts": facts, "setting": setting, "unquantized_perplexity": 19.0}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "scaling.json").write_text(json.dumps({"passed": False}))
    return tmp_path


def test_table_targets_and_picture_come_from_the_results(readme_figures, results):
    section, picture = readme_figures.figures(results)
    assert "| unquantized | 19.00 | 0 | 100 % |" in section
    assert "| frugallm x | 20.00 (19.00 to 21.00) | 0.1000 | 80.0 % | 100 | 7 | 1.00 |" in section
    assert "| W8A8 smoothquant s | 22.00 (21.00 to 23.00) | 0.1000 | 80.0 % |  |  |  |" in section
    assert "1 of 3 targets" in section and "smoothquant s: 90.0 %; met" not in section
    assert (
        "- gptq: time (p & q): 0.500, **missed**" in section and "calibration tokens: **missed**" in section
    )
    assert "`m`" in section and "commit 0123456789" in section
    drawn = ET.fromstring(picture)
    words = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert {"frugallm x: 20.00", "llm-compressor <y>: 21.00", "unquantized 19.00"} <= set(words)
    circles = {c.get("fill"): c for c in drawn.iter() if c.tag.endswith("circle")}
    assert float(circles["#1f6feb"].get("cx")) < float(circles["#8250df"].get("cx"))  # smaller is left
    assert float(circles["#1f6feb"].get("cy")) > float(circles["#8250df"].get("cy"))  # better is below


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ({"value": 0.5}, "0.500"),
        ({"value": 2**30, "unit": "bytes"}, "1.00 GiB"),
        ({"relative_difference": 0.0012, "worst": "Q4_0"}, "0.12 % apart at most (Q4_0)"),
        ({"value": 0.00089, "worst": "gemma3"}, "0.00089 at most (gemma3)"),
        ({"different": []}, "all"),
        ({"different": ["a", "b"]}, "all but a, b"),
        ({"same": 3, "of": 8, "transformers with itself": 4}, "3 of 8, transformers with itself 4"),
        (
            {"vllm": 0.25, "transformers with itself": 0.125},
            "0.25 nats apart, transformers from itself 0.125",
        ),
    ],
)
def test_every_kind_of_verdict_is_told(readme_figures, verdict, words):
    assert readme_figures.measured(verdict) == words


def test_without_results_there_are_no_figures(readme_figures, tmp_path):
    section, picture = readme_figures.figures(tmp_path)
    assert picture is None and not re.search(r"\d", section) and "frugal reproduce" in section


def test_labels_are_kept_apart(readme_figures):
    lines = readme_figures.spaced([30.0, 31.0, 32.0, 355.0, 356.0, 357.0])
    assert lines == sorted(lines) and lines[-1] <= readme_figures.BOTTOM
    assert min(b - a for a, b in pairwise(lines)) >= readme_figures.SPACING


def test_the_comparison_is_that_of_the_results(comparison):
    made = comparison.made(ROOT / "results")
    stale = "run: python benchmarks/comparison.py"
    assert made is not None
    assert (ROOT / "docs" / comparison.PAGE).read_text(encoding="utf-8") == made[0], stale
    assert (ROOT / "results" / comparison.PLOT).read_text(encoding="utf-8") == made[1], stale


def test_targets_are_told_where_they_were_measured(readme_figures, results):
    found = {name: readme_figures.read(results, name) for name in readme_figures.TARGETED}
    lines = readme_figures.targets(found)
    assert len(lines) == 3 and any("smoothquant s: 90.0 %; met" in line for line in lines)
    assert readme_figures.in_short(["- a: met"])[0].startswith("1 of 1 targets")


def compared(windows, kl, **more):
    figures = {"nll_per_window": [1.0] * windows, "reference_nll_per_window": [0.5] * windows}
    return {
        "evaluation": figures | {"windows": windows, "kl_per_window": [kl] * (windows - 1) + [9.0]},
        **more,
    }


def test_everything_is_compared_on_the_windows_that_all_have(comparison, tmp_path):
    setting = {"model": "m", "samples": 1, "seq_len": 2, "window_length": 4}
    setting |= {"calibration": "c.txt", "evaluation": "e.txt"}
    written = {
        "gptq_vs_llmcompressor": {
            "frugallm a": compared(4, 0.2, weights_bytes=10**8),
            "llm-compressor <b>": compared(4, 0.3, weights_bytes=10**8),
        },
        "gguf_llama_cpp": {"Q4_0": compared(3, 0.1, bytes=2 * 10**8)},
        "pruning_vs_llmcompressor": {"frugallm wanda": compared(3, 0.4, weights_bytes=3 * 10**8)},
        "quantization": {"W3 gptq": compared(3, 0.5, weights_bytes=10**8)},
        "file_sizes": {"llama.cpp Q4_0": compared(3, 0.6, weights_bytes=10**8)},
    }
    for name, arms in written.items():
        alone = {"without_peer": ["75 MB: hqq"]} if name == "file_sizes" else {}
        (tmp_path / f"{name}.json").write_text(json.dumps({"setting": setting, "arms": arms} | alone))
    page, picture = comparison.made(tmp_path)
    assert "the first 3 windows" in page and "unquantized perplexity 1.65" in page
    lines = [line.split(" | ")[1:5] for line in page.splitlines() if re.match(r"\| \d", line)]
    assert lines == [
        ["**frugallm a**", "100.0", "0.2000", "2.72"],
        ["llm-compressor <b>", "100.0", "0.3000", "2.72"],
        ["gguf Q4_0", "200.0", "3.0667", "2.72"],
        ["frugallm wanda", "", "3.2667", "2.72"],
        ["frugallm W3 gptq", "100.0", "3.3333", "2.72"],
        ["llama.cpp Q4_0", "100.0", "3.4000", "2.72"],
    ]
    assert "`llama.cpp` rows are" in page and "3 % more: 75 MB: hqq." in page
    circles = [e for e in ET.fromstring(picture).iter() if e.tag.endswith("circle") and len(e)]
    across = {e[0].text: float(e.get("cx")) for e in circles}
    assert across["frugallm a"] == across["llm-compressor <b>"] < across["gguf Q4_0"]
    assert len(across) == 5


def test_a_way_of_nobody_is_refused(comparison):
    with pytest.raises(ValueError, match="somebody"):
        comparison.side_of("somebody's")
