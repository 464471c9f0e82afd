"""A method on trial: two small random models, and the method's runs on them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from frugallm.compress.plan import make_plan
from frugallm.compress.prepare import prepared
from frugallm.errors import FrugalError
from frugallm.formats import shards
from frugallm.job import Job, Workplace, assemble, compress
from frugallm.method import Method
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.in_memory import InMemory
from frugallm.progress import Progress
from frugallm.recipe import Recipe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PretrainedConfig

Kind = Literal["tied", "untied"]
Kept = TypeVar("Kept")
KINDS: tuple[Kind, ...] = ("tied", "untied")
#: Grouped heads, and widths that are no multiple of 128; the second has biases, and wide heads.
SHAPES: dict[Kind, dict[str, Any]] = {
    "tied": {
        "vocab_size": 67,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "untied": {
        "vocab_size": 83,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
BLOCKS = 2
WINDOWS = (6, 48)


def random_model(kind: Kind, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return a random model with uneven channels, gains away from one and biases away from zero."""
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=BLOCKS, max_position_embeddings=128, dtype=dtype, **SHAPES[kind])
    return randomized(config, seed=KINDS.index(kind)).to(dtype)


def randomized(config: PretrainedConfig, seed: int) -> Any:
    """Return a float32 model of any family with uneven channels, gains away from one and biases away from zero."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                spread = 0.5 + torch.rand(parameter.shape[-1])
                parameter.copy_(torch.randn_like(parameter) * spread * 0.15)
    return model


@cache
def windows(kind: Kind) -> Tensor:
    """Return calibration windows ``(windows, length)`` of random tokens."""
    return torch.randint(SHAPES[kind]["vocab_size"], WINDOWS, generator=torch.Generator().manual_seed(7))


def job_for(
    checkpoint: Checkpoint,
    steps: Sequence[Method],
    tokens: Tensor | None,
    *,
    seed: int = 0,
    stored: torch.dtype = torch.bfloat16,
    fast: torch.dtype = torch.float32,
    hidden_limit: int = 2**30,
) -> Job:
    """Return the job of compressing ``checkpoint`` with ``steps``, calibrated on ``tokens``."""
    recipe = Recipe(steps=tuple(steps))
    original, checkpoint = checkpoint, prepared(steps, checkpoint, seed)
    plan = make_plan(recipe.steps, checkpoint)
    threads = torch.get_num_threads()
    return Job(checkpoint, recipe, plan, tokens, None, seed, stored, fast, threads, hidden_limit, original)


@dataclass(frozen=True)
class Run:
    """A finished run: its job, its place, and the folder that would be handed out."""

    job: Job
    place: Workplace

    @property
    def folder(self) -> Path:
        """The folder that would be handed out."""
        return self.place.folder

    def digest(self) -> str:
        """Return the SHA-256 of all files of the folder."""
        total = hashlib.sha256()
        for file in sorted(self.folder.iterdir()):
            total.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
        return total.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Return all stored tensors by name."""
        (file,) = self.folder.glob("*.safetensors")
        return shards.read_shard(file)


def carry_out(job: Job, out: Path, progress: Progress | None = None, *, resume: bool = False) -> Run:
    """Do a job up to the folder that would be handed out, which stays unnamed beside ``out``."""
    place = Workplace(out)
    place.prepare(job, resume=resume, overwrite=False)
    job = compress(job, place, progress or Progress())
    assemble(job, place)
    return Run(job, place)


class Trial:
    """A method on trial.

    Parameters
    ----------
    method
        The class; its runs with default parameters are kept.
    """

    def __init__(self, method: type[Method]) -> None:
        self.method = method
        self._folder = tempfile.TemporaryDirectory(prefix="frugal-check-")
        self._runs: dict[tuple[Kind, torch.dtype], Run] = {}
        self._kept: dict[Any, Any] = {}
        self._count = 0

    def __enter__(self) -> Trial:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # handing products this small to more threads takes longer than doing them
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads)
        self._folder.cleanup()

    def out(self) -> Path:
        """Return a path that nothing lies at yet."""
        self._count += 1
        return Path(self._folder.name) / f"run-{self._count}"

    def kept(self, key: Any, make: Callable[[], Kept]) -> Kept:
        """Return what ``make`` gave when it was first asked for ``key``."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def job(self, kind: Kind = "tied", dtype: torch.dtype = torch.float32, **parameters: Any) -> Job:
        """Return the job of compressing a random model with this method alone."""
        return job_for(InMemory(random_model(kind, dtype)), [self.method(**parameters)], windows(kind))

    def run(self, kind: Kind = "tied", dtype: torch.dtype = torch.float32, **parameters: Any) -> Run:
        """Compress a random model with this method alone; runs with default parameters are kept."""
        if parameters:
            return carry_out(self.job(kind, dtype, **parameters), self.out())
        if (kind, dtype) not in self._runs:
            self._runs[kind, dtype] = carry_out(self.job(kind, dtype), self.out())
        return self._runs[kind, dtype]

    def accepts(self, **parameters: Any) -> bool:
        """Whether parameters that are legal by themselves make sense together, and with the random models."""
        from frugallm.conformance.train_methods import train_job
        from frugallm.inference.contract import InferenceMethod
        from frugallm.training.contract import TrainMethod
        from frugallm.training.run import check_steps, probe

        try:
            for kind in KINDS:
                if issubclass(self.method, InferenceMethod):
                    self.method(**parameters)
                elif issubclass(self.method, TrainMethod):
                    job = train_job(self.method, kind, **parameters)
                    check_steps(job.steps, job.origin.scratch)
                    probe(job.steps, job.origin)
                else:
                    self.job(kind, **parameters)
        except FrugalError:
            return False
        return True
