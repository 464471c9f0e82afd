"""Objectives of distillation: pure functions of logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def logit_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean ``KL(teacher || student)`` of logits ``(..., vocabulary)``, in nats/token."""
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()
