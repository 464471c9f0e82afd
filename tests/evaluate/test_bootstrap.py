"""Intervals cover what they claim to, and verdicts follow the rule in the docstring."""

import math

import pytest
import torch

from frugallm.evaluate.bootstrap import Measure, interval, measure, verdict


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(100):
        low, high = interval(3 + torch.randn(30, generator=generator), seed=trial)
        hits += low < 3 < high
    assert 0.87 < hits / 100 < 1


def test_interval_is_that_of_the_normal_theory_for_many_windows():
    x = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = interval(x)
    half = 1.96 * float(x.std()) / math.sqrt(400)
    assert low == pytest.approx(float(x.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(x.mean()) + half, abs=0.1 * half)


def test_interval_is_seeded_and_unknown_for_one_window_or_no_number():
    x = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert interval(x, seed=5) == interval(x, seed=5)
    assert interval(x, seed=5) != interval(x, seed=6)
    assert interval([1.0]) is None
    assert interval([1.0, math.nan]) is None


def test_pairing_finds_a_small_difference_that_windows_hide():
    base = torch.linspace(1, 4, 16, dtype=torch.float64)
    worse = base + 0.02
    apart = interval(base)[1] - interval(base)[0]
    paired = measure(worse - base, "", of=torch.exp)
    assert apart > 0.5 and paired.low > 1 and paired.high - paired.low < 1e-6
    assert paired.value == pytest.approx(math.exp(0.02))


@pytest.mark.parametrize(
    ("perplexity", "reference", "low", "high", "expected"),
    [
        (20.0, 10.0, 1.9, 2.1, "worse"),
        (9.0, 10.0, 0.85, 0.95, "better"),
        (10.1, 10.0, 0.99, 1.03, "same within noise"),
        (10.0, 10.0, 1.0, 1.0, "same within noise"),
        (100.1, 10.0, 9.0, 11.0, "broken"),
        (1001.0, 900.0, 0.9, 1.1, "broken"),
        (math.nan, 10.0, None, None, "broken"),
        (math.inf, None, None, None, "broken"),
        (20.0, None, None, None, None),
        (20.0, 10.0, None, None, None),
    ],
)
def test_verdicts(perplexity, reference, low, high, expected):
    ratio = Measure(value=perplexity / reference, low=low, high=high) if reference else None
    assert verdict(perplexity, 1000, reference, ratio) == expected
