"""The Trainer of ``transformers`` at work on a student: the loop, checkpoints and devices are its own."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from frugallm.errors import JobError, RecipeError
from frugallm.progress import Progress
from frugallm.training.contract import TrainMethod

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel, TrainingArguments

    from frugallm.models.family import Family

#: Written into a checkpoint once everything else of it is there: a kill may leave half of one.
COMPLETE = "complete"
#: How often the loss is noted, as a share of all steps, and how long the learning rate rises.
NOTES, WARM_UP = 50, 0.05


@dataclass(frozen=True)
class Settings:
    """How long and how fast to train.

    Attributes
    ----------
    max_steps, batch
        Steps of the optimizer, and windows per step.
    learning_rate
        The highest.
    save_every
        Steps between checkpoints.
    """

    max_steps: int
    batch: int
    learning_rate: float
    seed: int
    save_every: int = 100


def objective(steps: Sequence[TrainMethod]) -> TrainMethod:
    """Return the step whose loss is trained on: the one that has its own, or plain cross-entropy."""
    return next((step for step in steps if step.has_loss), TrainMethod())


def begin(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    steps: Sequence[TrainMethod],
    family: Family,
    windows: Tensor,
    seed: int,
) -> Tensor:
    """Make a student ready for training in place; return the windows to train on, ``(windows, length)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what a rewrite adds may begin at random
        for step in steps:
            step.rewrite(student, family)
        for step in steps:
            if step.has_data:
                windows = step.data(teacher or student, windows, seed)
        for step in steps:
            step.ready(student, windows)
    return windows


def fit(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    steps: Sequence[TrainMethod],
    windows: Tensor,
    settings: Settings,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
) -> list[dict[str, float]]:
    """Train ``student`` in place.

    Parameters
    ----------
    student
        The model, made ready by :func:`begin`; float32.
    teacher
        What the loss compares with, if it does.
    windows
        Token ids ``(windows, length)``; taken in an order that the seed decides.
    checkpoints
        Folder of the Trainer's checkpoints; training goes on from the last complete one. ``None``: none are kept.

    Returns
    -------
    list
        ``{"step", "loss"}`` as it went.

    Raises
    ------
    JobError
        If the loss is not finite any more.
    """
    shown = progress or Progress()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        folder = checkpoints or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments = _arguments(steps, settings, folder, keep=checkpoints is not None, windows=len(windows))
        trainer = _trainer(student, teacher, steps, windows, arguments, shown)
        last = None if checkpoints is None else last_checkpoint(checkpoints)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    student.eval()
    history = trainer.state.log_history
    return [{"step": note["step"], "loss": note["loss"]} for note in history if "loss" in note]


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint that was written completely."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def method_arguments(steps: Sequence[TrainMethod]) -> dict[str, Any]:
    """Return the settings of the optimization that the steps make.

    Raises
    ------
    RecipeError
        If two of them differ.
    """
    found: dict[str, Any] = {}
    by: dict[str, str] = {}
    for step in steps:
        for key, value in step.arguments().items():
            if found.get(key, value) != value:
                raise RecipeError(
                    f"{step.name()} sets {key} to {value}, {by[key]} to {found[key]}",
                    "Give both the same value",
                )
            found[key], by[key] = value, step.name()
    return found


def _arguments(
    steps: Sequence[TrainMethod], settings: Settings, folder: Path, *, keep: bool, windows: int
) -> TrainingArguments:
    from transformers import TrainingArguments

    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(WARM_UP * settings.max_steps),
        "save_strategy": "steps" if keep else "no",
        "save_steps": settings.save_every,
        "save_total_limit": 2,
        "logging_strategy": "steps",
        "logging_steps": max(1, settings.max_steps // NOTES),
        "dataloader_drop_last": windows >= settings.batch,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    return TrainingArguments(**{**chosen, **method_arguments(steps)})


def _trainer(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    steps: Sequence[TrainMethod],
    windows: Tensor,
    arguments: TrainingArguments,
    progress: Progress,
) -> Any:
    """Return a Trainer whose loss, optimizer and schedule are those of the steps."""
    from transformers import PrinterCallback, Trainer, TrainerCallback

    judge = objective(steps)

    class Watch(TrainerCallback):
        """Reports every step, and says which checkpoints are complete."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.event("step", index=state.global_step, of=args.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    class Loop(Trainer):
        """The Trainer, asking the steps."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            with contextlib.ExitStack() as stack:
                for step in steps:
                    stack.enter_context(step.context())
                loss = judge.loss(model, teacher, inputs)
            if not torch.isfinite(loss):
                raise JobError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1}",
                    "Lower --learning-rate",
                )
            return (loss, {}) if return_outputs else loss

        def create_optimizer(self, model: Any = None) -> Optimizer:
            if self.optimizer is None:
                rate = self.args.learning_rate
                self.optimizer = next(filter(None, (s.optimizer(student, rate) for s in steps)), None)
            return super().create_optimizer(model)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
            if self.lr_scheduler is None:
                chosen = self.optimizer if optimizer is None else optimizer
                made = (s.schedule(cast("Optimizer", chosen), num_training_steps) for s in steps)
                self.lr_scheduler = cast("Any", next(filter(None, made), None))
            return super().create_scheduler(num_training_steps, optimizer)

    trainer = Loop(
        model=student,
        args=arguments,
        train_dataset=[{"input_ids": window, "index": torch.tensor(i)} for i, window in enumerate(windows)],
        data_collator=_batch,
        callbacks=[Watch()],
    )
    trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    return trainer


def _batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries say about their own doings from standard error."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
