"""The setting of the quality figures: model, calibration tokens, held-out windows, one evaluator for all."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frugallm.evaluate import Evaluation
    from frugallm.models.checkpoint import Checkpoint

MODEL = "smollm2-135m-offgrid"
CALIBRATION, EVALUATION = Path("wikitext2") / "valid.txt", Path("wikitext2") / "test.txt"


@dataclass(frozen=True)
class Setting:
    """Everything that both sides share. ``data`` holds ``wikitext2/valid.txt`` and ``wikitext2/test.txt``."""

    data: Path
    samples: int = 128
    seq_len: int = 512
    windows: int = 32
    window_length: int = 2048
    seed: int = 0
    threads: int = 2

    def facts(self) -> dict[str, Any]:
        """Return the setting as JSON values, without paths of this machine."""
        own = {key: value for key, value in asdict(self).items() if key != "data"}
        return {"model": MODEL, "calibration": str(CALIBRATION), "evaluation": str(EVALUATION), **own}

    def run_options(self) -> list[str]:
        """Return the options of ``frugal run`` that stand for this setting."""
        return [
            f"--text={self.data / CALIBRATION}",
            f"--samples={self.samples}",
            f"--seq-len={self.seq_len}",
            f"--seed={self.seed}",
            f"--threads={self.threads}",
            "--no-evaluate",
            "--progress=json",
        ]


def options(about: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that make a :class:`Setting`; the defaults are those of the published figures.

    ``about`` is the docstring of the benchmark, of which ``--help`` shows the first line.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with wikitext2/valid.txt and test.txt"
    )
    parser.add_argument("--samples", type=int, default=Setting.samples, help="calibration windows")
    parser.add_argument("--windows", type=int, default=Setting.windows, help="held-out windows")
    parser.add_argument("--threads", type=int, default=Setting.threads)
    parser.add_argument(
        "--work", type=Path, help="keep models and outputs there (default: a temporary folder)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="with --work: keep what an earlier run of this benchmark made there",
    )
    parser.add_argument(
        "--only", nargs="*", default=[], help="run only these arms (names, or parts of names)"
    )
    return parser


def given(args: argparse.Namespace) -> Setting:
    """Return the setting that the options say."""
    return Setting(args.data, samples=args.samples, windows=args.windows, threads=args.threads)


def dense_folder(folder: Path) -> Path:
    """Write the model once as a plain float32 Hugging Face folder, from which every side starts."""
    import torch

    from frugallm.models.open import dense_model, open_checkpoint

    if not (folder / "config.json").exists():
        checkpoint = open_checkpoint(MODEL)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in checkpoint.companions().items():
            (folder / name).write_bytes(content)
        checkpoint.tokenizer.save_pretrained(folder)
        dense_model(checkpoint, torch.float32).save_pretrained(folder)
    return folder


def calibration_tokens(setting: Setting, model: Path, file: Path) -> Path:
    """Write the windows that ``frugal run`` calibrates with for the peer: ``input_ids (samples, length)``."""
    from safetensors.torch import save_file

    from frugallm.models.open import open_checkpoint
    from frugallm.text import calibration_windows, open_text

    tokenizer = open_checkpoint(model).tokenizer
    text = open_text(setting.data / CALIBRATION, "calibrate", tokenizer)
    windows = calibration_windows(text, tokenizer, setting.samples, setting.seq_len, setting.seed)
    save_file({"input_ids": windows}, file)
    return file


def evaluate_folders(
    setting: Setting, candidates: Mapping[str, Path | Checkpoint], reference: Path
) -> dict[str, Evaluation]:
    """Return one evaluation per candidate against ``reference``, all on the same windows.

    A folder is loaded as :func:`frugallm.models.load` does it; a checkpoint is taken with the values that it reads.
    """
    return Judge(setting, reference).evaluate(candidates)


class Judge:
    """The evaluator of all figures: the windows of a setting and what the reference makes of them.

    Parameters
    ----------
    setting, reference
        The setting, and the model before compression.
    spare
        If given, that many windows of the calibration text which nothing is calibrated with, as long as those that are:
        what choices are made by. Otherwise the windows of the figures.
    """

    def __init__(self, setting: Setting, reference: Path, spare: int | None = None) -> None:
        import torch

        from frugallm.evaluate import TextFacts
        from frugallm.evaluate.evaluation import Reference
        from frugallm.models.open import open_checkpoint
        from frugallm.text import calibration_windows, evaluation_windows, leading_bos, open_text

        torch.set_num_threads(setting.threads)
        self.tokenizer = open_checkpoint(reference).tokenizer
        file = EVALUATION if spare is None else CALIBRATION
        text = open_text(setting.data / file, "evaluate", self.tokenizer)
        text = text.model_copy(update={"name": str(file)})
        if spare is None:
            windows = evaluation_windows(text, self.tokenizer, setting.windows, setting.window_length)
        else:  # more of the same random order, the first of which are calibrated with
            count = setting.samples + spare
            drawn = calibration_windows(text, self.tokenizer, count, setting.seq_len, setting.seed)
            windows = drawn[setting.samples :]
        self.windows, self.text = windows, TextFacts.of(text, windows)
        self.bos = leading_bos(self.tokenizer) is not None
        self.reference = Reference(str(reference), windows, tokenizer=self.tokenizer)

    def evaluate(self, candidates: Mapping[str, Path | Checkpoint]) -> dict[str, Evaluation]:
        """Return one evaluation per candidate."""
        from frugallm.evaluate import evaluate_all

        found = evaluate_all(
            {name: str(one) if isinstance(one, Path) else one for name, one in candidates.items()},
            self.reference,
            self.windows,
            text=self.text,
            bos=self.bos,
            tokenizer=self.tokenizer,
        )
        return {name: one.model_copy(update={"against": MODEL}) for name, one in found.items()}


def compare(ours: Evaluation, theirs: Evaluation, seed: int = 0) -> dict[str, Any]:
    """Return perplexity and KL of ours against theirs with paired 95 % intervals over the same windows."""
    import torch

    from frugallm.evaluate.bootstrap import measure

    def gap(name: str) -> torch.Tensor:
        one, other = (torch.tensor(getattr(e, name), dtype=torch.float64) for e in (ours, theirs))
        return one - other

    return {
        "ours": ours.model,
        "theirs": theirs.model,
        "perplexity_difference": ours.perplexity.value - theirs.perplexity.value,
        "perplexity_ratio": measure(gap("nll_per_window"), "", seed, torch.exp).model_dump(),
        "kl_difference": measure(gap("kl_per_window"), "nats/token", seed).model_dump(),
    }


def chat_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a question in the model's chat template."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def pick(arms: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the arms named by ``wanted``, wholly or, where there is no such name, in part; all if it is empty."""
    matches = {arm for word in wanted for arm in arms if arm == word or (word not in arms and word in arm)}
    return [arm for arm in arms if not wanted or arm in matches]


def kept_folder(work: Path | None) -> AbstractContextManager[str]:
    """Return ``work``, made if need be, or a temporary folder that goes when the context ends."""
    if work is None:
        return tempfile.TemporaryDirectory(prefix="frugallm-benchmark-")
    work.mkdir(parents=True, exist_ok=True)
    return nullcontext(str(work))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
