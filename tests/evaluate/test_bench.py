"""The bench measures each recipe once, against the original, and draws claims from paired windows."""

from typing import ClassVar

import pytest
import torch

from frugallm.errors import ParameterError
from frugallm.evaluate.bench import Bench
from frugallm.method import Card, Method
from frugallm.models.in_memory import InMemory


class Noise(Method):
    """Adds seeded noise of a given size to every weight."""

    card: ClassVar[Card] = Card(title="Noise", summary="damage of a given size")
    size: float = 0.1
    seed: int = 0


@pytest.fixture
def bench(model, make_tokenizer, make_model, windows):
    calls = []

    def compress(checkpoint, steps, calibration, out):
        calls.append(steps)
        damaged = make_model()
        for step in steps:
            generator = torch.Generator().manual_seed(step.seed)
            for parameter in damaged.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += step.size * parameter.abs().mean() * noise
        damaged.save_pretrained(out)
        make_tokenizer().save_pretrained(out)
        assert calibration.shape == (4, 16)
        return out

    checkpoint = InMemory(model, make_tokenizer())
    calibration = torch.zeros(4, 16, dtype=torch.int64)
    with Bench(checkpoint, calibration, windows, compress, dtype="fp32") as bench:
        bench.calls = calls
        yield bench


def test_each_recipe_is_compressed_once_and_its_folder_removed(bench):
    first = bench.evaluate(Noise(size=0.05))
    assert bench.evaluate(Noise(size=0.05)) is first and len(bench.calls) == 1
    assert bench.evaluate(Noise(size=0.06)).kl.value > first.kl.value and len(bench.calls) == 2
    assert first.kl.value > 0 and len(first.reference_nll_per_window) == len(bench.windows)
    assert "noise" in first.model or "test_bench" in first.model


def test_a_claim_passes_only_if_the_paired_interval_is_below_zero(bench):
    claim = bench.claim_lower([Noise(size=0.02)], [Noise(size=0.3)], "more noise")
    assert claim.passed and claim.value < claim.baseline_value and claim.details["interval"][1] < 0
    turned = bench.claim_lower([Noise(size=0.3)], [Noise(size=0.02)], "less noise")
    assert not turned.passed and "interval" in turned.reason
    same = bench.claim_lower([Noise(size=0.02)], [Noise(size=0.02)], "itself")
    assert not same.passed and same.details["interval"] == [0, 0]
    assert len(bench.calls) == 2
    by_perplexity = bench.claim_lower([Noise(size=0.02)], [Noise(size=0.3)], "more noise", "perplexity")
    ours = bench.evaluate(Noise(size=0.02)).perplexity.value
    assert by_perplexity.value == pytest.approx(ours)
    half = bench.claim_lower([Noise(size=0.02)], [Noise(size=0.3)], "half of it", share=0.5)
    assert half.passed and half.baseline_value == pytest.approx(claim.baseline_value / 2)
    itself = bench.claim_lower([Noise(size=0.02)], [Noise(size=0.02)], "half of itself", share=0.5)
    assert not itself.passed and itself.value == pytest.approx(2 * itself.baseline_value)
    top1 = bench.compare(bench.evaluate(Noise(size=0.02)), bench.evaluate(Noise(size=0.3)), "top1")
    assert top1[0] > 0


def test_widths_are_those_of_the_block(bench):
    assert bench.widths["self_attn.q_proj"] == 32 and bench.widths["mlp.down_proj"] == 64


def test_one_window_is_refused(bench, windows):
    with pytest.raises(ParameterError, match="at least two held-out windows"):
        Bench(bench.checkpoint, bench.calibration, windows[:1], lambda *_: None)


def test_without_a_compress_function_the_bench_does_what_the_main_job_does(
    make_model, make_tokenizer, windows
):
    from frugallm.compress.quantize.rtn import RTN

    original = make_model(hidden_size=64, intermediate_size=128)
    ids = windows % 12
    with Bench(InMemory(original, make_tokenizer()), ids, ids) as bench:
        fine, coarse = bench.evaluate(RTN(bits=8)), bench.evaluate(RTN(bits=3))
    assert 0 < fine.kl.value < 0.01 * coarse.kl.value
    assert fine.kl_per_window != coarse.kl_per_window
