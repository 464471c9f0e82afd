"""Rounding that gradients pass straight through."""

import torch

from frugallm.formats.quantized_tensor import ActivationScheme
from frugallm.formats.rounded_inputs import round_activations
from frugallm.training.straight_through import round_inputs, straight_through


def test_forward_is_exact_and_backward_the_identity():
    x = torch.randn(5, 7, requires_grad=True)
    rounded = (x.detach() * 3).round() / 3
    y = straight_through(x, rounded)
    assert torch.equal(y, rounded)
    weight = torch.randn(5, 7)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_x_plus_a_detached_difference_would_not_be_exact():
    # the usual way to write it; values as stored must be hit to the last bit
    x = torch.linspace(1e4, 3e4, 1001)
    rounded = torch.full_like(x, 0.1)
    assert not torch.equal(x + (rounded - x), rounded)
    assert torch.equal(straight_through(x, rounded), rounded)


def test_inputs_are_rounded_as_they_are_at_run_time():
    scheme = ActivationScheme(bits=4)
    x = torch.randn(2, 3, 16, requires_grad=True)
    y = round_inputs(x, scheme)
    assert torch.equal(y, round_activations(x.detach(), scheme, {}))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
