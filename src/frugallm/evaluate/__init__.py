"""Measure models: quality against the original, speed, memory; and the report drawn from it."""

from frugallm.evaluate.bootstrap import Measure
from frugallm.evaluate.evaluation import Evaluation, TextFacts, evaluate, evaluate_all
from frugallm.evaluate.precision import fast_dtype

__all__ = ["Evaluation", "Measure", "TextFacts", "evaluate", "evaluate_all", "fast_dtype"]
