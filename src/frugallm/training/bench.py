"""What claims of training methods are checked on: small models, trained on the spot."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frugallm.method import Claim, Method
from frugallm.models.family import family_of
from frugallm.progress import Progress
from frugallm.training.contract import TrainMethod
from frugallm.training.layouts import dense
from frugallm.training.loop import Settings, begin, fit
from frugallm.training.students import new_config, new_model, train_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Losses = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Size:
    """How large the models are and how long they are trained.

    Attributes
    ----------
    shape
        Changes to the configuration ``tiny``.
    steps, batch, length, rate
        Steps, windows per step, tokens per window and learning rate from scratch, the same for all arms.
    further
        Steps of a training that begins with a trained model.
    held_out
        Windows to judge on.
    """

    shape: Mapping[str, int]
    steps: int
    batch: int
    length: int
    rate: float
    further: int
    held_out: int


#: For the tests, 76 thousand weights and seconds, as few steps as plain training needs to bring the perplexity below a
#: fifth of the vocabulary; for results, a million and minutes.
SIZES = {
    "seconds": Size(
        {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2},
        steps=300,
        batch=8,
        length=64,
        rate=3e-3,
        further=60,
        held_out=48,
    ),
    "minutes": Size({}, steps=300, batch=8, length=128, rate=3e-3, further=150, held_out=64),
}
SEEDS = (0, 1, 2)
#: Windows that post-training steps are calibrated on.
CALIBRATION = 64


class TrainingBench:
    """Texts, and models trained on them; equal trainings are done once.

    Parameters
    ----------
    size
        A key of :data:`SIZES`.
    text, eval_text
        What :func:`frugallm.text.open_text` takes.
    """

    def __init__(
        self,
        size: str = "minutes",
        text: str | Path | None = None,
        eval_text: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.size, self.seeds = SIZES[size], SEEDS
        self.progress = progress or Progress()
        self._texts = (text, eval_text)
        self._kept: dict[Any, PreTrainedModel] = {}

    @property
    def name(self) -> str:
        """What the models are called in results."""
        millions = sum(p.numel() for p in new_model(self.config(), 0).parameters()) / 1e6
        return f"llama-{millions:.2g}M-trained-on-the-spot"

    @property
    def thorough(self) -> bool:
        """Whether there is time for arms that only explain."""
        return self.size is SIZES["minutes"]

    @cached_property
    def tokenizer(self) -> Any:
        """A tokenizer made from the text to train on."""
        from frugallm.text import open_text

        documents = open_text(self._texts[0], "calibrate").documents
        return train_tokenizer(documents, int(self.config().vocab_size))

    @cached_property
    def windows(self) -> Tensor:
        """Token ids to train on, ``(windows, length)``."""
        return self._windows(self._texts[0], "calibrate", None)

    @cached_property
    def held_out(self) -> Tensor:
        """Token ids to judge on, ``(windows, length)``."""
        return self._windows(self._texts[1], "evaluate", self.size.held_out)

    def _windows(self, text: str | Path | None, purpose: Any, count: int | None) -> Tensor:
        from frugallm.text import evaluation_windows, open_text

        return evaluation_windows(open_text(text, purpose), self.tokenizer, count, self.size.length)

    def config(self, width: float = 1) -> PretrainedConfig:
        """Return the configuration of the models, ``width`` times as wide."""
        config = new_config("tiny", dict(self.size.shape))
        wide = {key: int(width * getattr(config, key)) for key in ("hidden_size", "intermediate_size")}
        return new_config("tiny", {**self.size.shape, **wide})

    def train(self, steps: Sequence[TrainMethod], seed: int = 0, width: float = 1) -> PreTrainedModel:
        """Return a model trained from scratch with these steps, as it is when it is stored.

        Without steps: plain training with the Trainer's defaults.
        """
        key = (tuple(steps), seed, width)
        if key not in self._kept:
            student = new_model(self.config(width), seed)
            self._kept[key] = self._fit(
                student, None, steps, self.windows, seed, self.size.steps, self.size.rate
            )
        return copy.deepcopy(self._kept[key])

    def further(
        self,
        steps: Sequence[TrainMethod],
        seed: int,
        rate: float,
        windows: Tensor | None = None,
        count: int | None = None,
    ) -> PreTrainedModel:
        """Return what plain training gave, trained further with these steps against itself as the teacher.

        ``rate``: the learning rate; ``windows``: to train on, in the place of the text; ``count``: how many steps.
        """
        key = ("further", tuple(steps), seed, rate, None if windows is None else id(windows), count)
        if key not in self._kept:
            teacher = self.train([], seed).requires_grad_(False)
            student = copy.deepcopy(teacher).requires_grad_(True)
            chosen = self.windows if windows is None else windows
            long = self.size.further if count is None else count
            self._kept[key] = self._fit(student, teacher, steps, chosen, seed, long, rate)
        return copy.deepcopy(self._kept[key])

    def _fit(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        steps: Sequence[TrainMethod],
        windows: Tensor,
        seed: int,
        count: int,
        rate: float,
    ) -> PreTrainedModel:
        from frugallm.training.result import as_stored

        family = family_of(student.config)
        windows = begin(student, teacher, steps, family, windows, seed)
        settings = Settings(count, self.size.batch, rate, seed)
        if count:
            fit(student, teacher, steps, windows, settings, self.progress)
        student.eval()
        found = (step.hand_on(student, family, torch.bfloat16) for step in steps)
        as_stored(student, next(filter(None, found), None) or dense(torch.bfloat16), torch.bfloat16)
        return student

    def compressed(self, model: PreTrainedModel, steps: Sequence[Method]) -> PreTrainedModel:
        """Return a plain trained model after post-training steps, as it is stored."""
        from frugallm.evaluate.bench import compress_for_evaluation
        from frugallm.models.in_memory import InMemory

        checkpoint, calibration = InMemory(model, self.tokenizer), self.windows[:CALIBRATION]
        with tempfile.TemporaryDirectory() as folder:
            return compress_for_evaluation(
                checkpoint, steps, calibration, Path(folder) / "out", in_memory=True
            )

    @torch.inference_mode()
    def loss(self, model: PreTrainedModel) -> float:
        """Return the mean loss on held-out text in nats/token."""
        total = 0.0
        for batch in self.held_out.split(16):
            total += float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
        return total / len(self.held_out)

    @torch.inference_mode()
    def divergence(self, model: PreTrainedModel, teacher: PreTrainedModel) -> float:
        """Return the mean KL divergence from ``teacher`` on held-out text in nats/token."""
        total = 0.0
        for batch in self.held_out.split(16):
            p = teacher(input_ids=batch, use_cache=False).logits.log_softmax(-1)
            q = model(input_ids=batch, use_cache=False).logits.log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).mean()) * len(batch)
        return total / len(self.held_out)

    def claim_order(
        self,
        values: Losses,
        pairs: Sequence[tuple[str, str]],
        metric: str = "loss, nats/token",
        **details: Any,
    ) -> Claim:
        """Claim that in every pair the first arm's value is lower than the second's, whatever the seed.

        The first pair gives the values of the claim. Means, spread and every seed's value are in the details.
        """
        differences = {
            f"{a} - {b}": [x - y for x, y in zip(values[a], values[b], strict=True)] for a, b in pairs
        }
        failed = [name for name, each in differences.items() if not all(d < 0 for d in each)]
        first, second = pairs[0]
        return Claim(
            metric=metric,
            value=statistics.fmean(values[first]),
            baseline=second,
            baseline_value=statistics.fmean(values[second]),
            passed=not failed,
            model=self.name,
            reason=f"not below zero for every seed: {', '.join(failed)}" if failed else "",
            details={
                "seeds": list(self.seeds),
                "arms": {
                    name: {
                        "mean": statistics.fmean(each),
                        "spread": max(each) - min(each),
                        "values": list(each),
                    }
                    for name, each in values.items()
                },
                "differences": differences,
                **details,
            },
        )
