"""Rotation: turn the model into a basis in which neither weights nor activations have outliers (QuaRot).

Idea
----
A few channels of the residual stream are much larger than the others and spoil every grid that they share. An orthogonal
change of basis leaves the model's function as it is and spreads each of them over all channels. Where values are written
and read by linears alone it is multiplied into the weights and costs nothing; the input of a down projection, behind
an activation function, is rotated at run time, right before it is rounded.

Formula
-------
``X (tokens, width)`` residual stream, ``g`` a norm's gain, ``Q`` orthogonal, ``W_in`` what reads, ``W_out`` what writes::

    norm(X; g) W_in^T = norm(X; 1) (W_in diag(g))^T                           (1)
    norm(X Q; 1) = norm(X; 1) Q                                               (2)
    E' = E Q,   W_in' = W_in diag(g) Q,   W_out' = Q^T W_out                  (3)

Values and output projection, with one matrix for all heads, and the down projection, with a Hadamard matrix ``R``::

    W_v' = R_h^T W_v (each head),   W_o' = W_o R_h (each head)                (4)
    x -> round(x R) R^T,   W_down stored as the codes of W_down R             (5)

When to use it
--------------
First in a recipe. ``rotate inputs:bits=4 gptq:bits=4`` for activations in few bits, where it decides everything; ``rotate
gptq:bits=3`` for weights alone, where the result is an ordinary folder that every engine loads.

Cost
----
Seconds, and no text. A head tied to the embedding is stored on its own afterwards, since the final gain moves into it.
The rotation of eq. (5) costs ``in (12 + 128)`` operations a token at run time for ``in = 1536``; it is only there where
inputs are rounded, unless ``online`` says otherwise. What lies on a grid already (a model unpacked from 4 bits) no longer
does.

Differences from the paper
--------------------------
No embedding is centered: the authors' code subtracts the mean of every row, which changes the function of RMSNorm models.
Models with LayerNorm are rotated as well, by matrices that keep the mean over the channels. Gemma's norms behind the
sublayers cannot be moved, so its models are refused. The output projection is rotated within heads, not across them;
queries and keys are not rotated (that serves a rounded cache); ``R`` has no random signs. Where no Hadamard matrix of
a width is known the largest block that divides it is taken.

References
----------
Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman: QuaRot, NeurIPS 2024,
https://arxiv.org/abs/2404.00456; code https://github.com/spcl/QuaRot. Liu et al.: SpinQuant, ICLR 2025,
https://arxiv.org/abs/2405.16406, learns the matrices.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from frugallm.compress.contract import PrepareMethod
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.hadamard import hadamard_block
from frugallm.compress.quantize.inputs import Inputs
from frugallm.method import Card, Claim

if TYPE_CHECKING:
    from frugallm.evaluate.bench import Bench
    from frugallm.models.checkpoint import Checkpoint


class Rotate(PrepareMethod):
    """Rotate the residual stream, the values, and rounded inputs of down projections."""

    card: ClassVar[Card] = Card(
        title="Rotation (QuaRot)",
        summary="an orthogonal change of basis that spreads outliers over all channels, before anything is rounded",
        paper="QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        authors="Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman",
        year=2024,
        venue="NeurIPS",
        arxiv="2404.00456",
        code="https://github.com/spcl/QuaRot",
        baseline="the same rounding without rotation",
        claim="With weights and inputs in 4 bits, one scale a token, less than half the divergence is left.",
    )

    matrices: Literal["hadamard", "orthogonal"] = Field(
        "hadamard",
        description="Hadamard matrices with random signs, or uniformly distributed orthogonal ones",
    )
    heads: bool = Field(True, description="also rotate values, within each head")
    online: Literal["rounded", "always", "never"] = Field(
        "rounded",
        description="rotate inputs of down projections at run time: where they are rounded, always, never",
    )

    def prepare(self, checkpoint: Checkpoint, seed: int) -> Checkpoint:
        """Return the model in the other basis, eq. (1) to (4)."""
        from frugallm.models.rotated import Rotated

        return Rotated(checkpoint, seed, kind=self.matrices, heads=self.heads)

    def rotations(self, checkpoint: Checkpoint, rounded: Collection[str]) -> dict[str, int]:
        """Return the order of ``R``, eq. (5), for what follows an activation function."""
        family, found = checkpoint.family, {}
        for index in range(checkpoint.config.num_hidden_layers):
            for sub in family.graph(checkpoint.config, index):
                for site in sub.outputs if not sub.attention else ():
                    name = f"{family.block(index)}.{site.name}"
                    if self.online == "always" or (self.online == "rounded" and name in rounded):
                        found[name] = hadamard_block(checkpoint.shape(f"{name}.weight")[1])
        return found

    @classmethod
    def claim(cls, bench: Bench) -> Claim:
        """Compare with no rotation, weights by GPTQ and inputs per token in 4 bits: KL to the original, held-out text."""
        rounding = [Inputs(bits=4), GPTQ(bits=4)]
        return bench.claim_lower(
            ours=[cls(), *rounding],
            baseline=rounding,
            baseline_name="half the KL of gptq W4 and inputs A4 without rotation",
            share=0.5,
        )
