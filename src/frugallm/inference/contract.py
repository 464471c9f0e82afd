"""The contract of methods that act while a model answers: what such a method says, and what the engine does with it.

An :class:`InferenceMethod` changes no stored model, so it is no step of a recipe. It says

``why_not(config)``
    which models it is not for, and why;
``runner(checkpoint, blocks)``
    what computes steps with it, for the engine and for its checks;
``stored_as``, ``tolerance``
    which stored form it works on, and how far from the plain model with the same weights it may end.

Unless a method writes these verbs itself, it is a part of the native step (:mod:`frugallm.kernels`), which the engine takes
by itself wherever it can: nobody has to ask for the method, and nobody can leave it out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from frugallm.errors import ModelError, ParameterError, RecipeError
from frugallm.method import Method

if TYPE_CHECKING:
    from frugallm.engine.runner import Runner
    from frugallm.evaluate.bench import Bench
    from frugallm.models.checkpoint import Checkpoint


class InferenceMethod(Method):
    """A method that acts while a model answers."""

    #: Steps of a recipe that store a model in a form on which the method has work to do; none: any model.
    stored_as: ClassVar[tuple[str, ...]] = ()
    #: Squared error of logits, over their square, against the plain model that computes the same weights in float32.
    tolerance: ClassVar[float]

    def why_not(self, config: Any) -> str:
        """Return why the engine does not do it for a model of this configuration, or nothing."""
        from frugallm.kernels.decoder import why_not

        return why_not(config)

    def runner(
        self, checkpoint: Checkpoint, blocks: int, *, path: str | None = None, threads: int | None = None
    ) -> Runner:
        """Return what computes steps with this method.

        Parameters
        ----------
        checkpoint
            As :func:`frugallm.models.open_checkpoint` returns it with ``compressed=True``.
        blocks
            Blocks of the cache.
        path, threads
            Native path and threads; ``None``: those in use.

        Raises
        ------
        ModelError
            If the method is not for such a model.
        """
        from frugallm.kernels.decoder import read_decoder
        from frugallm.kernels.native_runner import NativeRunner

        return NativeRunner(read_decoder(checkpoint), blocks, threads, path)

    @classmethod
    def claim_needs(cls) -> str:
        """Return what is missing here for the claim: native kernels, unless they are in use."""
        from frugallm.kernels import library

        if library.path_name() != "reference":
            return ""
        asked = "FRUGAL_KERNELS asks for the reference" if library.usable_paths() else "they are not built"
        return f"native kernels, and {asked}"

    @classmethod
    def check_claim(cls, bench: Bench) -> None:
        """Refuse a claim that would say nothing about the method, here or on the bench's model.

        Raises
        ------
        ParameterError
            If there are no native kernels, or they are not in use.
        ModelError
            If the method is not for the bench's model.
        """
        if needs := cls.claim_needs():
            raise ParameterError(
                f"the claim of {cls.name()} needs {needs}",
                "Unset FRUGAL_KERNELS, or install a C++ compiler and then the package again",
            )
        if reason := cls().why_not(bench.checkpoint.config):
            raise ModelError(f"the claim of {cls.name()} cannot be checked on {bench.model_name}: {reason}")


def refuse_inference(step: Method) -> None:
    """Refuse a method that acts while a model answers as a step of a recipe.

    Raises
    ------
    RecipeError
        With what to do in its place.
    """
    if isinstance(step, InferenceMethod):
        raise RecipeError(
            f"'{step.name()}' acts while a model answers and is no step of a recipe",
            "Leave it out: frugal generate, frugal chat and frugallm.LLM do it by themselves",
        )
