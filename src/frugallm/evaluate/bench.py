"""The bench: what a method's claim is checked on."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from frugallm.errors import ParameterError
from frugallm.evaluate.bootstrap import interval
from frugallm.evaluate.evaluation import Evaluation, Reference, TextFacts, evaluate_all
from frugallm.evaluate.precision import Precision, fast_dtype
from frugallm.method import Claim, Method
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.open import open_checkpoint
from frugallm.progress import Progress
from frugallm.recipe import Recipe
from frugallm.text import calibration_windows, evaluation_windows, leading_bos, open_text

if TYPE_CHECKING:
    from frugallm.evaluate.evaluation import Source
    from frugallm.training.bench import TrainingBench

Metric = Literal["kl", "perplexity", "top1"]
Compress = Callable[[Checkpoint, Sequence[Method], Tensor, Path], Any]


class Bench:
    """A model, calibration and held-out text: compresses the model with recipes, and measures what that cost.

    Results are kept by recipe, so that claims that share a baseline compute it once.

    Parameters
    ----------
    model
        What :func:`frugallm.models.open_checkpoint` takes.
    calibration
        Token ids ``(samples, length)``, or a text to cut ``samples`` windows of 512 from (``None``: the embedded
        one).
    windows
        Held-out token ids ``(windows, length)``, at least two windows, or a text to cut 8 windows of 2048
        from.
    compress
        Does the work: ``compress(checkpoint, steps, calibration, out) -> model``, the folder as it would be
        handed on or a loaded model. What :func:`frugallm.run` does, if not given.
    samples
        How many calibration windows to cut from a text.
    dtype, seed
        Of the evaluation; see :func:`frugallm.evaluate.evaluate`.
    progress
        Where to report events of the evaluation.
    training
        Where methods that act while a model is trained are checked: small models of its own, not this one. On the same
        texts, if not given.
    scratch
        Existing folder in which results are written, one at a time; the system's folder for such things, if not given.

    Attributes
    ----------
    checkpoint, calibration, windows
        The model opened, and token ids as above.
    text
        Which text the held-out windows are from, where it is known.
    """

    def __init__(
        self,
        model: Source,
        calibration: Tensor | str | Path | None = None,
        windows: Tensor | str | Path | None = None,
        compress: Compress | None = None,
        *,
        samples: int = 128,
        dtype: Precision = "auto",
        seed: int = 0,
        progress: Progress | None = None,
        training: TrainingBench | None = None,
        scratch: Path | None = None,
    ) -> None:
        from frugallm.training.bench import TrainingBench

        self.training = training or TrainingBench(
            text=None if isinstance(calibration, Tensor) else calibration,
            eval_text=None if isinstance(windows, Tensor) else windows,
            progress=progress,
        )
        self.checkpoint = open_checkpoint(model)
        tokenizer = self.checkpoint.tokenizer
        self.text: TextFacts | None = None
        if not isinstance(calibration, Tensor):
            opened = open_text(calibration, "calibrate", tokenizer)
            calibration = calibration_windows(opened, tokenizer, samples, 512, seed)
        if not isinstance(windows, Tensor):
            opened = open_text(windows, "evaluate", tokenizer)
            windows = evaluation_windows(opened, tokenizer, 8, 2048)
            self.text = TextFacts.of(opened, windows)
        if len(windows) < 2:
            raise ParameterError("a bench needs at least two held-out windows", "One window has no interval")
        self.calibration = calibration
        self.windows = windows
        self._compress = compress or compress_for_evaluation
        self._bos = leading_bos(tokenizer) is not None
        self._dtype = dtype
        self._seed = seed
        self._progress = progress
        self._results: dict[str, Evaluation] = {}
        self._bits: dict[str, float] = {}
        self._file_bits: dict[str, float] = {}
        self._reference: Reference | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="frugal-bench-", dir=scratch)

    @property
    def model_name(self) -> str:
        """What the user calls the model."""
        return self.checkpoint.name

    @property
    def widths(self) -> dict[str, int]:
        """Input width of every linear of a block, by its path inside the block."""
        family = self.checkpoint.family
        return {
            p: self.checkpoint.shape(f"{family.block(0)}.{p}.weight")[1]
            for p in family.linears(self.checkpoint.config, 0)
        }

    def evaluate(self, *steps: Method) -> Evaluation:
        """Compress the model with these steps, and evaluate the resulting folder against the original."""
        recipe = Recipe(steps=steps)
        digest = recipe.digest()
        if digest not in self._results:
            out = Path(self._folder.name) / digest
            try:
                compressed = self._compress(self.checkpoint, steps, self.calibration, out)
                self._bits[digest] = _stored_bits(out)
                self._file_bits[digest] = _file_bits(out, self.checkpoint)
                self._results[digest] = self._judge(" ".join(recipe.to_cli()), compressed)
            finally:
                shutil.rmtree(out, ignore_errors=True)
        return self._results[digest]

    def kl(self, *steps: Method) -> float:
        """Return the mean KL (nats/token) to the original of the model compressed with these steps."""
        return _value(self.evaluate(*steps), "kl")

    def stored_bits(self, *steps: Method) -> float:
        """Return the bits a weight of the linears that these steps compress, everything stored about them counted."""
        self.evaluate(*steps)
        return self._bits[Recipe(steps=steps).digest()]

    def file_bits(self, *steps: Method) -> float:
        """Return the bits a weight of the original that the whole files take after these steps."""
        self.evaluate(*steps)
        return self._file_bits[Recipe(steps=steps).digest()]

    def kl_of(self, name: str, model: Any) -> float:
        """Return the mean KL (nats/token) to the original of a model or folder made by other means."""
        return _value(self._judge(name, model), "kl")

    def _judge(self, name: str, model: Any) -> Evaluation:
        return evaluate_all(
            {name: model},
            self._kept_reference(),
            self.windows,
            text=self.text,
            bos=self._bos,
            seed=self._seed,
            dtype=self._dtype,
            progress=self._progress,
        )[name]

    def compare(
        self, a: Evaluation, b: Evaluation, metric: Metric = "kl", share: float = 1.0
    ) -> tuple[float, float] | None:
        """Return the paired bootstrap interval of ``a`` minus ``share`` times ``b``.

        Of mean KL (nats/token), of top-1 agreement (share), or of log perplexity: the log of their ratio.
        ``None`` if a value is not finite.
        """
        difference = _per_window(a, metric) - share * _per_window(b, metric)
        return interval(difference, self._seed)

    def claim_lower(
        self,
        ours: Sequence[Method],
        baseline: Sequence[Method],
        baseline_name: str,
        metric: Metric = "kl",
        share: float = 1.0,
    ) -> Claim:
        """Claim that one recipe's ``metric`` is lower than another's, or a ``share`` of it, on held-out text.

        A share makes sense for KL only, which is zero where nothing is lost. The claim passes if the whole interval
        of the paired difference lies below zero.
        """
        a, b = self.evaluate(*ours), self.evaluate(*baseline)
        ends = self.compare(a, b, metric, share)
        passed = ends is not None and ends[1] < 0
        return Claim(
            metric=metric,
            value=_value(a, metric),
            baseline=baseline_name,
            baseline_value=share * _value(b, metric),
            passed=passed,
            model=self.model_name,
            reason="" if passed else "the paired 95 % interval of the difference does not lie below zero",
            details={
                "recipe": Recipe(steps=tuple(ours)).to_cli(),
                "baseline_recipe": Recipe(steps=tuple(baseline)).to_cli(),
                "interval": list(ends) if ends else None,
                "share": share,
                "perplexity": [a.perplexity.value, b.perplexity.value],
                "reference_perplexity": float(torch.tensor(a.reference_nll_per_window).double().mean().exp()),
                "verdicts": [a.verdict, b.verdict],
                "windows": list(self.windows.shape),
                "calibration": list(self.calibration.shape),
            },
        )

    def close(self) -> None:
        """Remove the temporary folder."""
        self._folder.cleanup()

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _kept_reference(self) -> Reference:
        if self._reference is None:
            self._reference = Reference(
                self.checkpoint, self.windows, dtype=self._dtype, progress=self._progress
            )
        return self._reference


def _per_window(evaluation: Evaluation, metric: Metric) -> Tensor:
    columns = {
        "kl": evaluation.kl_per_window,
        "perplexity": evaluation.nll_per_window,
        "top1": evaluation.top1_per_window,
    }
    return torch.tensor(columns[metric], dtype=torch.float64)


def _value(evaluation: Evaluation, metric: Metric) -> float:
    mean = _per_window(evaluation, metric).mean()
    return float(mean.exp() if metric == "perplexity" else mean)


def _stored_bits(out: Path) -> float:
    """Return the bits a weight in the folder ``out``; not a number where it holds no compressed linears."""
    from frugallm.formats.decoded import Decoded, Own
    from frugallm.models.safetensors_folder import read_config

    if not (out / "config.json").is_file():
        return math.nan
    settings = read_config(out).get("quantization_config")
    reader = Own if settings and settings["quant_method"] == Own.method else Decoded
    return reader(out).bits_per_weight() if settings else math.nan


def _file_bits(out: Path, original: Checkpoint) -> float:
    """Return the bits of all weight files in the folder ``out`` over the original's weights; NaN if there are none."""
    files = [path.stat().st_size for path in out.glob("*.safetensors")]
    weights = sum(math.prod(original.shape(name)) for name in original.names())
    return 8 * sum(files) / weights if files else math.nan


def compress_for_evaluation(
    checkpoint: Checkpoint,
    steps: Sequence[Method],
    calibration: Tensor,
    out: Path,
    *,
    in_memory: bool = False,
    seed: int = 0,
    stored: torch.dtype = torch.bfloat16,
    hidden_limit: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Do what the main job does, as far as the folder is written; return what loads and holds its values.

    That is the folder where plain ``transformers`` loads it, otherwise, and with ``in_memory``, a plain model.

    Parameters
    ----------
    calibration
        Token ids ``(samples, length)``; without any, steps that read text are refused.
    seed, stored, hidden_limit
        Of the job: every random choice, the type of uncompressed tensors, bytes of hidden states in memory.
    progress
        Where to report the events of compressing.
    """
    from frugallm.compress.plan import make_plan
    from frugallm.compress.prepare import prepared
    from frugallm.formats.engines import loads_in_transformers
    from frugallm.formats.stored import model_in_memory
    from frugallm.job import Job, Workplace, assemble, compress, needs_text
    from frugallm.walk.hidden import HIDDEN_LIMIT

    original, checkpoint = checkpoint, prepared(steps, checkpoint, seed)
    plan = make_plan(tuple(steps), checkpoint)
    job = Job(
        checkpoint=checkpoint,
        recipe=Recipe(steps=tuple(steps)),
        plan=plan,
        windows=calibration if len(calibration) and needs_text(plan) else None,
        text=None,
        seed=seed,
        stored=stored,
        fast=fast_dtype(),
        threads=torch.get_num_threads(),
        hidden_limit=HIDDEN_LIMIT if hidden_limit is None else hidden_limit,
        original=original,
    )
    place = Workplace(out)
    place.prepare(job, resume=False, overwrite=True)
    job = compress(job, place, progress or Progress())
    assemble(job, place)
    by_folder = loads_in_transformers(job.plan) and not in_memory
    result = out if by_folder else model_in_memory(place.stored(job))
    place.finish()
    return result
