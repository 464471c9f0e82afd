"""FrugalLM: the cheapest model that keeps its quality, with the proof."""

__version__ = "0.1.0"
