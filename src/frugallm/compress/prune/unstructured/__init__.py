"""Zeros anywhere in a weight, or n of every m consecutive inputs: one file per method, and the parts they share."""
