"""What every method that acts while a model answers must pass, on two small random models and every native path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from frugallm.compress.plan import make_plan
from frugallm.conformance.outcome import Check, CheckFailed, ensure
from frugallm.conformance.trial import KINDS, Kind, Trial, carry_out, job_for, random_model, windows
from frugallm.engine.runner import Runner
from frugallm.errors import FrugalError, ModelError, RecipeError
from frugallm.formats.decoded import Decoded
from frugallm.formats.stored import model_in_memory
from frugallm.formats.verify import relative_error
from frugallm.inference.contract import InferenceMethod
from frugallm.method import Method
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.in_memory import InMemory
from frugallm.recipe import Recipe
from frugallm.training.run import training_steps

#: Blocks of a cache on trial, and the block in which a text's first, second, … tokens lie.
BLOCKS, TABLE = 40, (7, 2, 9)
#: Tokens of a text that is longer than what any kernel takes at once.
LONG = 600


def checks(method: type[Method]) -> list[Check]:
    """Return the checks for a method that acts while a model answers."""
    return [
        the_plain_model_is_computed,
        every_path_computes_the_same_bits,
        cutting_a_text_changes_no_bit,
        a_long_text_is_no_exception,
        texts_beside_it_change_no_bit,
        threads_and_blocks_change_no_bit,
        later_tokens_change_no_bit,
        a_copied_block_holds_the_same,
        what_it_is_not_for_is_refused,
        it_is_no_step_of_a_recipe,
    ]


@dataclass(frozen=True)
class Stored:
    """A small model in the form that a method works on, and the plain model with the same weights."""

    checkpoint: Checkpoint
    plain: Any


def stored(trial: Trial, kind: Kind) -> Stored:
    """Return a random model as the method's ``stored_as`` says, computed in float32 beside it; made once."""
    return trial.kept(kind, lambda: _store(trial, kind))


def _store(trial: Trial, kind: Kind) -> Stored:
    method = _method(trial)
    model = random_model(kind)
    model.config.max_position_embeddings = LONG
    if not method.stored_as:
        return Stored(InMemory(model), model)
    job = job_for(InMemory(model), Recipe.parse(method.stored_as).steps, None)
    run = carry_out(job, trial.out())
    return Stored(Decoded(run.folder), model_in_memory(run.place.stored(job)))


def _method(trial: Trial) -> type[InferenceMethod]:
    assert issubclass(trial.method, InferenceMethod)
    return trial.method


def _paths() -> tuple[str, ...]:
    from frugallm.kernels.library import usable_paths

    ensure(
        bool(usable_paths()), "there are no native kernels here; install a C++ compiler and the package again"
    )
    return usable_paths()


def _runner(trial: Trial, checkpoint: Checkpoint, path: str | None = None, threads: int = 1) -> Runner:
    return _method(trial)().runner(checkpoint, BLOCKS, path=path or _paths()[-1], threads=threads)


def _numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def logits(
    runner: Runner, tokens: Tensor, chunk: int | None = None, table: tuple[int, ...] = TABLE
) -> Tensor:
    """Return the logits of all tokens ``(length,)`` of one text, computed ``chunk`` at a time."""
    found = []
    for some in torch.arange(len(tokens), dtype=torch.int32).split(chunk or len(tokens)):
        ends, rows = _numbers(0, len(some)), torch.arange(len(some), dtype=torch.int32)
        found.append(runner.step(tokens[some.long()].int(), some, ends, _numbers(*table)[None], rows))
    return torch.cat(found)


def _same(trial: Trial, other: Any) -> Iterator[tuple[Kind, bool]]:
    """Yield for each model whether ``other(checkpoint, tokens)`` has the bits of a text computed alone and at once."""
    for kind in KINDS:
        model, tokens = stored(trial, kind), windows(kind)[0]
        yield (
            kind,
            torch.equal(other(model.checkpoint, tokens), logits(_runner(trial, model.checkpoint), tokens)),
        )


def the_plain_model_is_computed(trial: Trial) -> None:
    """Logits are those of the plain model with the same weights, within what the method says."""
    allowed = _method(trial).tolerance
    for kind in KINDS:
        model, tokens = stored(trial, kind), windows(kind)[0]
        with torch.inference_mode():
            expected = model.plain(tokens[None]).logits[0]
        for path in _paths():
            apart = relative_error(logits(_runner(trial, model.checkpoint, path), tokens), expected)
            ensure(apart <= allowed, f"{kind}, {path}: squared error {apart:.1e}, allowed are {allowed:.1e}")


def every_path_computes_the_same_bits(trial: Trial) -> None:
    """The processor's features decide the speed and nothing else."""
    for path in _paths():
        for kind, same in _same(
            trial, lambda model, text, path=path: logits(_runner(trial, model, path), text)
        ):
            ensure(same, f"{kind}: {path} computes other bits than {_paths()[-1]}")


def cutting_a_text_changes_no_bit(trial: Trial) -> None:
    """One token after the other, or several at a time: the same logits."""
    for chunk in (1, 7, 16):
        for kind, same in _same(trial, lambda model, text, n=chunk: logits(_runner(trial, model), text, n)):
            ensure(same, f"{kind}: {chunk} tokens at a time give other bits")


def a_long_text_is_no_exception(trial: Trial) -> None:
    """Behind hundreds of others a token's logits are still those of the plain model, however the text is cut."""
    allowed = _method(trial).tolerance
    table = tuple(reversed(range(BLOCKS)))
    for kind in KINDS:
        model, text = (
            stored(trial, kind),
            windows(kind).flatten().repeat(-(-LONG // windows(kind).numel()))[:LONG],
        )
        runner = _runner(trial, model.checkpoint)
        found = logits(runner, text, 250, table)
        with torch.inference_mode():
            apart = relative_error(found, model.plain(text[None]).logits[0])
        ensure(apart <= allowed, f"{kind}: squared error {apart:.1e}, allowed are {allowed:.1e}")
        same = torch.equal(logits(_runner(trial, model.checkpoint, threads=2), text, 97, table), found)
        ensure(same, f"{kind}: a text of {LONG} tokens has other bits when it is cut otherwise")


def texts_beside_it_change_no_bit(trial: Trial) -> None:
    """Three texts in one step have the logits of each alone."""
    for kind in KINDS:
        model, texts = stored(trial, kind), windows(kind)[:3]
        count, length = texts.shape
        runner = _runner(trial, model.checkpoint)
        places = torch.arange(length, dtype=torch.int32).repeat(count)
        starts = torch.arange(0, (count + 1) * length, length, dtype=torch.int32)
        tables = torch.arange(count * len(TABLE), dtype=torch.int32).view(count, -1)
        rows = torch.arange(count * length, dtype=torch.int32)
        together = runner.step(texts.flatten().int(), places, starts, tables, rows)
        alone = torch.cat([logits(runner, text) for text in texts])
        ensure(torch.equal(together, alone), f"{kind}: other texts in the step change bits")


def threads_and_blocks_change_no_bit(trial: Trial) -> None:
    """Neither how many threads share the work nor where the cache lies is seen in the logits."""
    moved = partial(logits, table=(0, 11, 4))
    for kind, same in _same(trial, lambda model, text: moved(_runner(trial, model, threads=3), text)):
        ensure(same, f"{kind}: three threads and other blocks give other bits")


def later_tokens_change_no_bit(trial: Trial) -> None:
    """A token does not see what comes behind it."""
    for kind in KINDS:
        model, tokens = stored(trial, kind), windows(kind)[0]
        runner, half = _runner(trial, model.checkpoint), len(tokens) // 2
        other = torch.cat((tokens[:half], tokens[half:].flip(0)))
        same = torch.equal(logits(runner, other)[:half], logits(runner, tokens)[:half])
        ensure(same, f"{kind}: tokens behind a token change its logits")


def a_copied_block_holds_the_same(trial: Trial) -> None:
    """A text goes on from copies of its blocks as from the blocks themselves."""
    for kind in KINDS:
        model, tokens = stored(trial, kind), windows(kind)[0]
        runner, last = _runner(trial, model.checkpoint), len(tokens) - 1
        expected = logits(runner, tokens)[-1]
        copies = tuple(block + 1 for block in TABLE)
        for source, target in zip(TABLE, copies, strict=True):
            runner.copy_block(source, target)
        where = tokens[last:].int(), _numbers(last), _numbers(0, 1), _numbers(*copies)[None], _numbers(0)
        ensure(torch.equal(runner.step(*where)[0], expected), f"{kind}: a copied block holds something else")


def what_it_is_not_for_is_refused(trial: Trial) -> None:
    """It says which models it is not for, and refuses them; others it takes."""
    from transformers import AutoModelForCausalLM, GPT2Config

    method = _method(trial)()
    config = GPT2Config(
        vocab_size=67, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    odd = InMemory(AutoModelForCausalLM.from_config(config))
    for checkpoint in (*(stored(trial, kind).checkpoint for kind in KINDS), odd):
        reason = method.why_not(checkpoint.config)
        try:
            method.runner(checkpoint, BLOCKS, path=_paths()[-1], threads=1)
        except ModelError as error:
            ensure(
                bool(reason), f"{checkpoint.config.model_type} is refused ({error}), and why_not says nothing"
            )
            ensure(bool(error.hint), f"the refusal says no mend: {error}")
        else:
            ensure(not reason, f"{checkpoint.config.model_type} is taken, and why_not says: {reason}")


def it_is_no_step_of_a_recipe(trial: Trial) -> None:
    """Neither a run nor a training takes it, and both say what to do in its place."""
    step = trial.method()
    for take in (lambda: make_plan([step], InMemory(random_model("tied"))), lambda: training_steps([step])):
        try:
            take()
        except RecipeError as error:
            told = step.name() in error.message and "frugal generate" in error.hint
            ensure(told, f"the refusal does not say what to do: {error}")
        except FrugalError as error:
            raise CheckFailed(f"it is refused for another reason: {error}") from error
        else:
            raise CheckFailed("it is taken as a step")
