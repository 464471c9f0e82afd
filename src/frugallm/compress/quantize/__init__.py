"""Quantization: one file per method, and the parts they share."""
