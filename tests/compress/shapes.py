"""Weights and second moments for tests of grids and solvers."""

import torch
from hypothesis import strategies as st

from frugallm.formats.quantized_tensor import WeightScheme

BITS = st.integers(2, 8)


@st.composite
def schemes(draw, symmetric=None):
    """A scheme and a width that its groups divide."""
    group = draw(st.sampled_from([None, 8, 16, 32]))
    width = draw(st.sampled_from([1, 7, 24, 65])) if group is None else group * draw(st.integers(1, 3))
    flag = draw(st.booleans()) if symmetric is None else symmetric
    dtype = draw(st.sampled_from(["bfloat16", "float32"]))
    return WeightScheme(bits=draw(BITS), symmetric=flag, group_size=group, scale_dtype=dtype), width


def random_weight(rows, width, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * size


def moment(width, tokens, seed=0):
    """Second moment of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * (
        0.05 + torch.rand(width, generator=generator) ** 3
    )
    x = torch.randn(tokens, width, generator=generator) @ mix
    return (x.T @ x) / tokens
