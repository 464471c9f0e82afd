"""The contract of methods that act while a model is trained: what such a method writes, and what the job does for it.

A :class:`TrainMethod` writes those of these verbs that its paper is about:

``rewrite(student, family)``
    Put modules of its own in the place of the model's, or set its configuration, before the first step. Weights keep
    their names and shapes; what is added gets names of its own. Rounding is seen in the forward and passed straight
    through in the backward (:mod:`frugallm.training.straight_through`).
``data(teacher, windows, seed)``
    Return the windows to train on, where they are not those of the text.
``ready(student, windows)``
    Give the student what it needs beside its weights for these windows, such as a memory of them.
``loss(student, teacher, batch)``
    A pure function of two models and token ids; next-token cross-entropy if not written. What it remembers between
    steps lies in buffers of the student and changes while that is in training mode only.
``arguments()``, ``optimizer(student, learning_rate)``, ``schedule(optimizer, steps)``
    What of the optimization is the method's own: settings of ``transformers.TrainingArguments``, an optimizer, its
    learning rates over time.
``context()``
    What the loss is computed in, such as autocast.
``hand_on(student, family, dtype)``
    How the trained model is stored; dense if not written.
``remarks(student, family, windows)``
    What the report should say about the trained model.

The job (:mod:`frugallm.training.run`) owns the rest: reading, the ``transformers`` Trainer with its loop, checkpoints and
devices, progress, resume, writing, verification, figures.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from frugallm.method import Method

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel

    from frugallm.models.family import Family
    from frugallm.training.layouts import Layout

#: ``input_ids (windows, length)`` and ``index (windows,)``, the place of each window among all that are trained on.
Batch = dict[str, Tensor]


class TrainMethod(Method):
    """A method that acts while a model is trained."""

    #: Where the weights come from: "model": those of the model given; "scratch": new ones; "either": the user's choice.
    begins: ClassVar[Literal["model", "scratch", "either"]] = "either"
    #: Whether the loss reads the model as it was before, which is then kept in memory as the teacher.
    needs_teacher: ClassVar[bool] = False
    #: Used unless the user gives one.
    learning_rate: ClassVar[float] = 1e-3

    @property
    def rewrites(self) -> bool:
        """Whether this method has a ``rewrite`` verb."""
        return type(self).rewrite is not TrainMethod.rewrite

    @property
    def has_loss(self) -> bool:
        """Whether this method has a ``loss`` of its own."""
        return type(self).loss is not TrainMethod.loss

    @property
    def has_data(self) -> bool:
        """Whether this method chooses what is trained on."""
        return type(self).data is not TrainMethod.data

    @property
    def hands_on(self) -> bool:
        """Whether this method decides how the model is stored."""
        return type(self).hand_on is not TrainMethod.hand_on

    def rewrite(self, student: PreTrainedModel, family: Family) -> None:
        """Put modules of this method into ``student``, whose parts ``family`` names."""

    def data(self, teacher: PreTrainedModel, windows: Tensor, seed: int) -> Tensor:
        """Return token windows to train on, ``(windows, length)``, in the place of those of the text."""
        return windows

    def ready(self, student: PreTrainedModel, windows: Tensor) -> None:
        """Give ``student`` what it needs beside its weights for ``windows (windows, length)``."""

    def loss(self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Tensor:
        """Return the mean loss of ``batch["input_ids"]`` ``(windows, length)``, in nats/token where it is one."""
        return student(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss

    def arguments(self) -> dict[str, Any]:
        """Return settings of ``transformers.TrainingArguments`` that are this method's own."""
        return {}

    def optimizer(self, student: PreTrainedModel, learning_rate: float) -> Optimizer | None:
        """Return the optimizer; ``None``: the Trainer's AdamW."""
        return None

    def schedule(self, optimizer: Optimizer, steps: int) -> LRScheduler | None:
        """Return how learning rates change over ``steps``; ``None``: a cosine after a short warm-up."""
        return None

    def context(self) -> AbstractContextManager[Any]:
        """Return what the loss is computed in."""
        return nullcontext()

    def remarks(self, student: PreTrainedModel, family: Family, windows: Tensor) -> list[str]:
        """Return what the report should say about the trained model, from windows of held-out text."""
        return []

    def hand_on(self, student: PreTrainedModel, family: Family, dtype: torch.dtype) -> Layout | None:
        """Return how the trained model is stored, what is not on a grid in ``dtype``; ``None``: dense."""
        return None
