"""The report says what was measured, in the same digits everywhere, and needs nothing but itself."""

import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from frugallm.errors import DataError
from frugallm.evaluate import Evaluation, TextFacts
from frugallm.evaluate.bootstrap import Measure
from frugallm.evaluate.figures import change, figure
from frugallm.evaluate.report import JobFacts, LayerError, ModelFacts, Report, merge
from frugallm.evaluate.report_plots import plots
from frugallm.evaluate.shares import StepShare
from frugallm.evaluate.speed import Rate


def quality(perplexity, kl, *, smoke=False, digest="d", verdict="worse"):
    return Evaluation(
        model="m",
        text=TextFacts(name="some text", digest=digest, smoke=smoke, tokens=100),
        windows=8,
        window_length=2048,
        bos=False,
        perplexity=Measure(value=perplexity, low=perplexity * 0.9, high=perplexity * 1.1),
        kl=Measure(value=kl, low=kl * 0.9, high=kl * 1.1, unit="nats/token"),
        perplexity_ratio=Measure(value=perplexity / 17, low=1.1, high=1.2),
        verdict=verdict,
        nll_per_window=[math.log(perplexity)] * 8,
        dtype="fp32",
        seconds=1.0,
    )


def report(name="out", smoke=False, digest="d", answer="It is <script>alert(1)</script> Paris | France"):
    before = ModelFacts(
        name="original",
        role="before",
        part_bytes={"embedding and head": 56_600_000, "blocks": 212_400_000},
        file_bytes=269_000_000,
        quality=quality(17.0, 0.0, smoke=smoke, digest=digest, verdict="same within noise"),
        decode=Rate.of([14.0, 12.0, 16.0]),
        answer="Paris.",
    )
    after = ModelFacts(
        name=name,
        part_bytes={"embedding and head": 56_600_000, "blocks": 57_400_000},
        file_bytes=114_000_000,
        compressed_bits=4.25,
        quality=quality(20.1234, 0.134, smoke=smoke, digest=digest),
        decode=Rate.of([28.0, 24.0, 32.0]),
        answer=answer,
    )
    job = JobFacts(
        recipe=["gptq:bits=4"],
        seconds={"compress": 71.2, "write": 1.24},
        peak_bytes=712_000_000,
        baseline_bytes=280_000_000,
        calibration=TextFacts(name="calibration text", digest="c" * 64, smoke=smoke),
        samples=32,
        seq_len=512,
        machine={"cpu": "a processor", "threads": 2, "cores": 2, "flags": ["avx2"], "python": "3.11.7"},
        versions={"torch": "2.13.0"},
    )
    layers = [
        LayerError(name=f"model.layers.{i}.self_attn.{k}_proj", error=0.1 * (i + 1), baseline_error=0.5)
        for i in range(3)
        for k in "qkvo"
    ]
    return Report(
        title="original → gptq",
        models=[before, after],
        job=job,
        prompt="What is the capital of France?",
        how_to_load={"vLLM": "vllm serve out"},
        layers=layers,
        notes=["a note"],
    )


@pytest.mark.parametrize(
    ("value", "unit", "ends", "expected"),
    [
        (None, "bytes", (), "–"),
        (999, "bytes", (), "999 bytes"),
        (1_000_000, "bytes", (), "1.0 MB"),
        (8_123_456_789, "bytes", (), "8.1 GB"),
        (71.2, "s", (), "1 min 11 s"),
        (9.96, "s", (), "10.0 s"),
        (0.9234, "share", (0.91, 0.935), "92.3 % (91.0 to 93.5)"),
        (14.21, "tokens/s", (13.0, 15.0), "14.2 tokens/s (13.0 to 15.0)"),
        (4.2549, "bits/weight", (), "4.25 bits/weight"),
        (0.0131254, "nats/token", (0.0121, 0.0141), "0.01313 nats/token (0.01210 to 0.01410)"),
        (17.0, "", (17.0, 17.0), "17.00"),
        (812345.6, "", (), "812,346"),
        (8.1e7, "", (), "8.100e+07"),
        (math.nan, "", (), "not finite"),
        (0.0, "nats/token", (), "0 nats/token"),
    ],
)
def test_figures(value, unit, ends, expected):
    assert figure(value, unit, *ends) == expected


def test_changes():
    assert [change(100, 42.4), change(100, 120), change(212.4, 57.4), change(10, 35), change(5, 5)] == [
        "−57.6 %",
        "+20.0 %",
        "÷ 3.7",
        "x 3.5",
        "=",
    ]
    assert change(None, 1) == change(1, None) == change(0, 1) == ""


def test_json_gives_the_same_report_back():
    assert Report.from_json(report().to_json()) == report()


def test_markdown_has_the_table_the_answers_and_the_facts():
    text = report().to_markdown()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert "| weights on disk | 269.0 MB | 114.0 MB | −57.6 % |" in table
    assert "| – blocks | 212.4 MB | 57.4 MB | ÷ 3.7 |" in table
    assert "| compressed part, bits/weight | – | 4.25 |  |" in table
    assert "| perplexity | 17.00 (15.30 to 18.70) | 20.12 (18.11 to 22.14) | +18.4 % |" in table
    assert "| KL divergence, nats/token | 0 | 0.1340 (0.1206 to 0.1474) |  |" in table
    assert "| decode, tokens/s | 14.0 (12.0 to 16.0) | 28.0 (24.0 to 32.0) | +100.0 % |" in table
    assert "| verdict | original | worse |  |" in table
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "Paris \\| France" in text and "vllm serve out" in text and "- Note: a note" in text
    assert "compress 1 min 11 s" in text and "712.0 MB (280.0 MB before it began)" in text
    assert "smoke" not in text


def test_smoke_figures_are_labelled_wherever_they_stand():
    smoky = report(smoke=True)
    text = smoky.to_markdown()
    for label in ("perplexity", "KL divergence"):
        assert f"| {label} (smoke figure)" in text
    assert "Quality is a smoke figure" in text
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(smoky.terminal_table())
    assert "perplexity (smoke figure)" in console.export_text()
    assert "smoke figure" in smoky.to_html().split("plotly")[0]


def test_terminal_table_has_every_row_of_the_markdown():
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report().terminal_table())
    text = console.export_text()
    for word in ("weights on disk", "−57.6 %", "20.12 (18.11 to 22.14)", "decode, tokens/s", "worse"):
        assert word in text


class Page(HTMLParser):
    """Collects what a page would fetch, and its tags outside scripts."""

    def __init__(self):
        super().__init__()
        self.fetched, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.fetched += [given[a] for a in ("src", "href") if a in given]

    def handle_data(self, data):
        if len(data) < 5000:
            self.text.append(data)


def test_page_is_self_contained_and_escapes_what_models_say():
    html = report().to_html()
    page = Page()
    page.feed(html)
    assert page.fetched == [] and "@import" not in html.split("plotly")[0]
    text = " ".join(page.text)
    assert "It is <script>alert(1)</script> Paris" in text and "<script>alert(1)" not in html
    lines = [line for line in report().to_markdown().splitlines() if line.startswith("|")]
    assert page.tags.count("table") == 1 and page.tags.count("tr") == len(lines) - 1
    for expected in ("114.0 MB", "vllm serve out", "What is the capital of France?", "prefers-color-scheme"):
        assert expected in html


def test_plots_show_the_figures_with_their_intervals():
    drawn = {title: figure for title, _, figure in plots(report())}
    cost = drawn["What quality costs: perplexity"]
    assert [trace.x[0] for trace in cost.data] == [269.0, 114.0]
    assert cost.data[1].y[0] == pytest.approx(20.1234)
    assert cost.data[1].error_y.array[0] == pytest.approx(2.01234)
    assert [t.y[0] for t in drawn["What quality costs: divergence"].data] == [0.0, 0.134]
    errors = drawn["Where the error lies"]
    assert {trace.name for trace in errors.data} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert list(errors.data[0].x) == [0, 1, 2]
    assert list(errors.data[0].y) == pytest.approx([0.2, 0.4, 0.6])
    bare = report().model_copy(update={"layers": [], "models": report().models[:1]})
    assert plots(bare) == []
    assert "plotly" not in bare.to_html().lower()


def with_shares():
    def measured(value):
        return Measure(value=value, low=value - 0.01, high=value + 0.01)

    figures = {"kl": measured(0.834), "share": measured(0.7), "perplexity": measured(31.5), "whole_bits": 6.7}
    harmful = figures | {"kl": measured(0.114), "share": measured(-0.02)}
    shares = [
        StepShare(step="os_plus", instead=["inputs:scale=static"], **figures),
        StepShare(step="lorc", **harmful),
        StepShare(step="rtn", reason="it is <plain> | itself"),
        StepShare(step="awq", **figures | {"kl": Measure(value=math.nan), "share": Measure(value=math.nan)}),
    ]
    return report().model_copy(update={"shares": shares})


def test_shares_of_steps_stand_beside_the_whole_recipe():
    text = with_shares().to_markdown()
    assert "| whole recipe |  | 0.1340 (0.1206 to 0.1474) | – | 20.12 (18.11 to 22.14) | – |" in text
    assert (
        "| without os_plus | inputs:scale=static | 0.8340 (0.8240 to 0.8440) | 0.7000 (0.6900 to 0.7100) |"
        in text
    )
    assert "| without lorc | nothing | 0.1140 (0.1040 to 0.1240) | -0.02000 (-0.03000 to -0.01000) |" in text
    assert "| without rtn | not measured: it is <plain> \\| itself | – | – | – | – |" in text
    assert "| without awq | nothing | not finite | not finite |" in text
    again = Report.from_json(with_shares().to_json()).shares
    assert again[:3] == with_shares().shares[:3] and math.isnan(again[3].share.value)


def test_the_page_shows_shares_as_a_table_and_a_plot():
    html = with_shares().to_html()
    page = Page()
    page.feed(html)
    lines = [line for line in with_shares().to_markdown().splitlines() if line.startswith("|")]
    assert page.tags.count("table") == 2 and page.tags.count("tr") == len(lines) - 2
    assert "-0.02000" in html and "it is &lt;plain&gt; | itself" in html
    [bars] = {title: figure for title, _, figure in plots(with_shares())}["What each step gives"].data
    assert list(bars.x) == [0.7, -0.02] and list(bars.y) == ["1. os_plus", "2. lorc"]
    assert list(bars.error_x.array) == pytest.approx([0.01, 0.01])
    assert bars.marker.color[0] != bars.marker.color[1]


def test_merging_keeps_one_original_and_refuses_other_texts():
    both = merge([report("a"), report("b")])
    assert [m.name for m in both.models] == ["original", "a", "b"] and both.notes == ["a note"]
    assert both.prompt == "What is the capital of France?"
    assert "| a | b |" in both.to_markdown() and "change" not in both.to_markdown()
    assert both.to_html().count("<h2>The same question</h2>") == 1
    with pytest.raises(DataError, match="other text or windows"):
        merge([report("a"), report("b", digest="other")])


def test_a_report_without_quality_speed_or_job_is_still_a_report():
    small = Report(title="sizes", models=[ModelFacts(name="x", file_bytes=5_000_000)])
    assert "| weights on disk | 5.0 MB |" in small.to_markdown()
    assert "perplexity" not in small.to_markdown() and "5.0 MB" in small.to_html()
