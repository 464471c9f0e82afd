"""Objectives of distillation: pure functions of logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def logit_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean ``KL(teacher || student)`` of logits ``(..., vocabulary)``, in nats/token."""
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()


def token_contrast(ours: Tensor, theirs: Tensor, others: Tensor, temperature: float) -> Tensor:
    """Return the mean loss of telling each token's counterpart from the other tokens of its window.

    Parameters
    ----------
    ours, theirs
        Representations of tokens, ``(windows, length, width)``; a token and its counterpart have the same place.
    others
        What tokens of other places are represented by, of the same shape; no gradient goes there.
    temperature
        Cosines are divided by it.
    """
    ours, theirs, others = (F.normalize(each.float(), dim=-1) for each in (ours, theirs, others.detach()))
    alike = (ours * theirs).sum(-1) / temperature  # (windows, length)
    unlike = ours @ others.transpose(1, 2) / temperature  # (windows, length, length)
    places = torch.eye(unlike.shape[1], dtype=torch.bool, device=unlike.device)
    all_ = torch.cat([alike[..., None], unlike.masked_fill(places, -torch.inf)], -1)
    return (all_.logsumexp(-1) - alike).mean()
