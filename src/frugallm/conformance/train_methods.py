"""What every method that acts while a model is trained must pass."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugallm.conformance.examples import variants
from frugallm.conformance.outcome import Check, CheckFailed, ensure
from frugallm.conformance.stored_models import outside_logits
from frugallm.conformance.trial import KINDS, SHAPES, Kind, Trial, random_model
from frugallm.errors import FrugalError
from frugallm.formats.verify import ROUNDED_INPUT_TOLERANCE, WEIGHT_ONLY_TOLERANCE, relative_error
from frugallm.method import Method
from frugallm.models.family import family_of
from frugallm.models.in_memory import InMemory
from frugallm.progress import Progress
from frugallm.training.contract import TrainMethod
from frugallm.training.layouts import Layout
from frugallm.training.loop import Settings, fit, objective
from frugallm.training.run import CHECKPOINTS, TrainJob, begin_job
from frugallm.training.students import Origin

#: Steps of a training on trial, windows per step, and the step after which one is killed.
STEPS, BATCH, KILLED_AT = 12, 4, 7
#: The windows that a loss is asked about.
FIRST = tuple(range(BATCH))


def checks(method: type[Method]) -> list[Check]:
    """Return the checks for a training method."""
    return [
        a_rewrite_keeps_names_and_shapes,
        the_loss_has_finite_gradients,
        the_loss_is_a_function_of_models_and_batch,
        the_order_of_windows_does_not_matter,
        training_lowers_the_loss,
        every_other_value_trains,
        two_trainings_are_equal_byte_for_byte,
        a_killed_training_continues_to_the_same_bytes,
        the_folder_is_what_was_trained,
        what_does_not_fit_is_refused,
    ]


class Killed(Exception):
    """Stands for a process that is killed."""


class KilledAt(Progress):
    """Ends a training after a step, as a kill would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def event(self, kind: str, **facts: Any) -> None:
        """Raise :class:`Killed` at the step."""
        if kind == "step" and facts["index"] == self.step:
            raise Killed


def windows(kind: Kind) -> Tensor:
    """Return token windows that repeat themselves, so that there is something to learn."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(SHAPES[kind]["vocab_size"], (8, 8), generator=generator)
    return ids.repeat(1, 3)  # (windows, 24)


def train_job(method: type[TrainMethod], kind: Kind = "tied", **parameters: Any) -> TrainJob:
    """Return the job of training a random model with one method, from where the method begins."""
    checkpoint = InMemory(random_model(kind))
    scratch = method.begins == "scratch"
    origin = Origin("random", checkpoint.config, None, checkpoint.family, checkpoint, scratch)
    rate = min(method.learning_rate, 3e-3)
    settings = Settings(STEPS, BATCH, rate, seed=0, save_every=3)
    threads = torch.get_num_threads()
    return TrainJob(origin, (method(**parameters),), windows(kind), {}, settings, torch.bfloat16, threads)


def carry_out(job: TrainJob, out: Path, progress: Progress | None = None) -> tuple[Any, Layout, Path]:
    """Train and write the folder; return the student, how it is stored, and where."""
    from frugallm.training.result import write_folder

    student, teacher, tokens = begin_job(job)
    fit(student, teacher, job.steps, tokens, job.settings, progress, out / CHECKPOINTS)
    return student, write_folder(job, student, out / "folder"), out / "folder"


def digest(folder: Path) -> str:
    """Return the SHA-256 of all files of a folder."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        total.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _method(trial: Trial) -> type[TrainMethod]:
    assert issubclass(trial.method, TrainMethod)
    return trial.method


def _loss(job: TrainJob, student: Any, teacher: Any, tokens: Tensor, rows: Sequence[int] = FIRST) -> Tensor:
    index = torch.tensor(rows)
    return objective(job.steps).loss(student, teacher, {"input_ids": tokens[index], "index": index})


def a_rewrite_keeps_names_and_shapes(trial: Trial) -> None:
    """Every tensor of the plain model is still there after a rewrite, and of its shape."""
    for kind in KINDS:
        job = train_job(_method(trial), kind)
        before = {n: t.shape for n, t in job.origin.student(0).state_dict().items()}
        student, _, _ = begin_job(job)
        after = {n: t.shape for n, t in student.state_dict().items()}
        lost = [name for name, shape in before.items() if after.get(name) != shape]
        ensure(not lost, f"{', '.join(lost[:3])} lost or of another shape")


def the_loss_has_finite_gradients(trial: Trial) -> None:
    """Whatever is trained gets a finite gradient, and most of it one that is not zero."""
    for kind in KINDS:
        job = train_job(_method(trial), kind)
        student, teacher, tokens = begin_job(job)
        student.train()
        loss = _loss(job, student, teacher, tokens)
        ensure(loss.ndim == 0 and bool(loss.isfinite()), f"the loss is {loss}")
        loss.backward()
        trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        none = [n for n, p in trained.items() if p.grad is None or not bool(p.grad.isfinite().all())]
        ensure(not none, f"no finite gradient of {', '.join(none[:3])}")
        zero = [n for n, p in trained.items() if p.grad is not None and not bool(p.grad.any())]
        ensure(len(zero) <= len(trained) / 4, f"the gradient of {', '.join(zero[:3])} is zero")


def the_loss_is_a_function_of_models_and_batch(trial: Trial) -> None:
    """Asked twice without training it says the same, and changes no weight."""
    job = train_job(_method(trial))
    student, teacher, tokens = begin_job(job)
    student.eval()
    before = {n: t.clone() for n, t in student.state_dict().items()}
    with torch.no_grad():
        first, second = (_loss(job, student, teacher, tokens) for _ in range(2))
    ensure(torch.equal(first, second), f"the loss is {first} and then {second}")
    moved = [n for n, t in student.state_dict().items() if not torch.equal(t, before[n])]
    ensure(not moved, f"the loss changes {', '.join(moved[:3])}")


def the_order_of_windows_does_not_matter(trial: Trial) -> None:
    """A batch is a set of windows."""
    job = train_job(_method(trial))
    student, teacher, tokens = begin_job(job)
    student.eval()
    with torch.no_grad():
        one, other = (_loss(job, student, teacher, tokens, rows) for rows in (FIRST, FIRST[::-1]))
    ensure(torch.allclose(one, other, rtol=1e-4), f"the loss is {one}, with windows turned round {other}")


def training_lowers_the_loss(trial: Trial) -> None:
    """Trained on a few windows, the loss on them falls."""
    for kind in KINDS:
        job = train_job(_method(trial), kind)
        student, teacher, tokens = begin_job(job)
        student.eval()
        with torch.no_grad():
            before = _loss(job, student, teacher, tokens)
        fit(student, teacher, job.steps, tokens[:BATCH], job.settings)
        with torch.no_grad():
            after = _loss(job, student, teacher, tokens)
        ensure(
            bool(after < before), f"the loss is {float(before):.4f}, after {STEPS} steps {float(after):.4f}"
        )


def every_other_value_trains(trial: Trial) -> None:
    """With every other legal value of a parameter a step can be made, and the result stored."""
    from frugallm.training.result import layout_of

    for name, value in variants(trial.method):
        if not trial.accepts(**{name: value}):
            continue
        job = train_job(_method(trial), **{name: value})
        student, teacher, tokens = begin_job(job)
        loss = _loss(job, student, teacher, tokens)
        ensure(bool(loss.isfinite()), f"{name}={value!r}: the loss is {loss}")
        loss.backward()
        layout_of(job, student)


def two_trainings_are_equal_byte_for_byte(trial: Trial) -> None:
    """The same training twice ends in the same files."""
    one, other = (carry_out(train_job(_method(trial)), trial.out())[2] for _ in range(2))
    ensure(digest(one) == digest(other), "two trainings end in different bytes")


def a_killed_training_continues_to_the_same_bytes(trial: Trial) -> None:
    """Killed between two checkpoints and continued, it is the training that was never killed."""
    out = trial.out()
    try:
        carry_out(train_job(_method(trial)), out, KilledAt(KILLED_AT))
    except Killed:
        kept = list((out / CHECKPOINTS).glob("checkpoint-*"))
        ensure(bool(kept), "killed, it left no checkpoint")
        folder = carry_out(train_job(_method(trial)), out)[2]
    else:
        raise CheckFailed(f"step {KILLED_AT} is not reported")
    unbroken = carry_out(train_job(_method(trial)), trial.out())[2]
    ensure(digest(folder) == digest(unbroken), "killed and continued, it ends in other bytes")


def the_folder_is_what_was_trained(trial: Trial) -> None:
    """The folder holds the codes of the trained model and computes its logits, read by us and by ``transformers``."""
    from frugallm.formats.packed_folder import reader_of
    from frugallm.models.open import dense_model, open_checkpoint

    for kind in KINDS:
        job = train_job(_method(trial), kind)
        student, layout, folder = carry_out(job, trial.out())
        (folder / "manifest.json").write_text("{}")
        checkpoint = open_checkpoint(folder, compressed=True)
        for name, q in layout.stored.items():
            same = torch.equal(checkpoint.tensor(f"{name}.weight").float(), q.dequantize())
            ensure(same, f"{name} is not in the folder as it was trained")
        with torch.inference_mode():
            wanted = student(job.windows[:2]).logits
            model = dense_model(checkpoint)
            if layout.stored:
                reader = reader_of(folder)
                assert reader is not None
                reader(folder).prepare(model)
            ours = model(job.windows[:2]).logits
        allowed = ROUNDED_INPUT_TOLERANCE if layout.rounds_inputs else WEIGHT_ONLY_TOLERANCE
        apart = relative_error(ours, wanted)
        ensure(apart <= allowed, f"read back it computes something else (squared error {apart:.1e})")
        if layout.in_transformers:
            apart = relative_error(outside_logits(folder, job.windows[:2]), wanted)
            ensure(apart <= allowed, f"transformers computes something else (squared error {apart:.1e})")


def what_does_not_fit_is_refused(trial: Trial) -> None:
    """On a model whose linears are no plain linears it works, or is refused before any work with an error of ours."""
    from transformers import GPT2Config

    from frugallm.training.run import probe

    config = GPT2Config(vocab_size=67, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    origin = Origin("gpt2", config, None, family_of(config), None, True)
    try:
        probe((_method(trial)(),), origin)
    except FrugalError as error:
        ensure(bool(error.hint), f"the refusal says no mend: {error}")
