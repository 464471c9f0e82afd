"""Objectives of distillation against sums written out."""

import math

import pytest
import torch

from frugallm.training.distillation import logit_divergence, token_contrast


def test_divergence_is_zero_at_the_teacher_and_that_of_the_definition():
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    wanted = (p * (p.log() - q.log())).sum(-1).mean()
    assert logit_divergence(student, teacher).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert logit_divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_contrast_is_that_of_the_definition():
    ours, theirs, others = (torch.randn(2, 4, 5).double() for _ in range(3))
    heat, total = 0.3, 0.0

    def likeness(a, b):
        return float(a @ b / (a.norm() * b.norm())) / heat

    for n in range(2):
        for i in range(4):
            alike = math.exp(likeness(ours[n, i], theirs[n, i]))
            unlike = sum(math.exp(likeness(ours[n, i], others[n, j])) for j in range(4) if j != i)
            total -= math.log(alike / (alike + unlike)) / 8
    found = token_contrast(ours.float(), theirs.float(), others.float(), heat)
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_a_token_is_no_negative_of_itself_and_others_get_no_gradient():
    ours = torch.randn(1, 3, 5, requires_grad=True)
    others = torch.randn(1, 3, 5, requires_grad=True)
    one = token_contrast(ours, ours.detach(), others, 0.1)
    changed = others.detach().clone()
    token_contrast(ours, ours.detach(), others, 0.1).backward()
    assert ours.grad.any() and others.grad is None
    for i in range(3):  # the loss of a window of one token has nothing to tell apart
        alone = token_contrast(ours[:, i : i + 1], ours[:, i : i + 1], changed[:, i : i + 1], 0.1)
        assert alone.item() == pytest.approx(0, abs=1e-6)
    assert one.item() > 0
