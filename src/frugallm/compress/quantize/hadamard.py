"""Orthogonal matrices that spread a vector evenly over its entries, and their fast application.

A value that is many times larger than its neighbors spoils the grid that all of them share. In a random orthogonal
basis its weight is shared by all entries. Hadamard matrices (entries of equal magnitude, orthogonal rows) spread best,
need no storage and are applied as a Kronecker product of small factors. Tensors in, tensors out; no module is touched.

Hadamard matrices of these orders are computed: powers of two (Sylvester), ``q + 1`` for a prime ``q = 3 mod 4`` and
``2 (q + 1)`` for a prime ``q = 1 mod 4`` (Paley), and their products: 576 = 36 x 16, 1536 = 12 x 128. For other widths
the matrix is block-diagonal, with equal blocks of the largest order that divides the width. Stored weights refer to
these matrices, so what is constructed for an order must never change.

References
----------
Paley: On Orthogonal Matrices, Journal of Mathematics and Physics 12, 1933.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_LARGEST_PALEY = 256  # larger ones exist, but a product with a dense factor of their size is slow
_LARGEST_FACTOR_BITS = 7  # 2^7: one product with a matrix of 128 columns is faster than two with smaller ones


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix ``R (n, n)``, kept as its parts: permute, flip signs, multiply by a Kronecker product.

    Attributes
    ----------
    factors
        ``(a, a)``, ``(b, b)``, … float64, orthogonal. Their Kronecker product stands in every block on the diagonal; the
        size of a block is the product of theirs.
    signs
        ``(n,)`` of 1 and -1 that entries are multiplied by before; ``None``: all 1.
    order
        ``(n,)`` permutation that entries are taken in before that; ``None``: as they are.
    """

    factors: tuple[Tensor, ...]
    signs: Tensor | None = None
    order: Tensor | None = None

    @property
    def block(self) -> int:
        """Entries that are mixed with each other."""
        return math.prod(len(f) for f in self.factors)

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x R`` for ``x (..., n)``, in the type of ``x``."""
        if self.order is not None:
            x = x[..., self.order]
        if self.signs is not None:
            x = x * self.signs.to(x.dtype)
        return _times(x, self.factors)

    def undo(self, x: Tensor) -> Tensor:
        """Return ``x R^T``: ``undo(apply(x))`` is ``x``."""
        x = _times(x, tuple(f.T for f in self.factors))
        if self.signs is not None:
            x = x * self.signs.to(x.dtype)
        return x if self.order is None else x[..., torch.argsort(self.order)]

    def matrix(self, width: int) -> Tensor:
        """Return ``R (width, width)`` float64."""
        return self.apply(torch.eye(width, dtype=torch.float64))


def _times(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """Multiply ``x (..., n)`` by the Kronecker product of ``factors`` in every block of its last dimension."""
    shape, after = x.shape, 1
    for factor in reversed(factors):
        size = len(factor)
        f = factor.to(x.dtype)
        if after == 1:
            x = (x.reshape(-1, size) @ f).view(shape)
        else:
            x = torch.matmul(f.T, x.reshape(-1, size, after)).view(shape)
        after *= size
    return x


def seeded(*place: object) -> torch.Generator:
    """Return a generator whose numbers depend on every word of ``place`` and on nothing else."""
    digest = hashlib.sha256(" ".join(map(str, place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# -- Hadamard matrices -------------------------------------------------------------------------------------------------


def hadamard(order: int) -> Tensor:
    """Return a Hadamard matrix ``(order, order)`` float64: entries 1 and -1, first column all 1, orthogonal rows.

    Raises
    ------
    ValueError
        If none of that order is constructed here.
    """
    sizes = _factor_sizes(order)
    if sizes is None:
        raise ValueError(f"no Hadamard matrix of order {order} is constructed here")
    whole = torch.ones(1, 1, dtype=torch.float64)
    for size in sizes:
        whole = torch.kron(whole, _factor(size))
    return whole


def hadamard_block(width: int) -> int:
    """Return the largest divisor of ``width`` of which there is a Hadamard matrix; 1 for odd widths."""
    return max(d for d in range(1, width + 1) if width % d == 0 and _factor_sizes(d) is not None)


def hadamard_rotation(block: int) -> Rotation:
    """Return the rotation by the Hadamard matrix of order ``block``, without chance: every entry is ``±block^-1/2``."""
    sizes = _factor_sizes(block)
    if sizes is None:
        raise ValueError(f"no Hadamard matrix of order {block} is constructed here")
    return Rotation(tuple(_factor(size) / math.sqrt(size) for size in sizes))


def random_hadamard(width: int, generator: torch.Generator) -> Rotation:
    """Return the Hadamard rotation of vectors ``(width,)`` with random signs before it, block-diagonal if it must be."""
    return Rotation(hadamard_rotation(hadamard_block(width)).factors, random_signs(width, generator))


def random_signs(width: int, generator: torch.Generator) -> Tensor:
    """Return ``(width,)`` float64 of 1 and -1."""
    return torch.randint(2, (width,), generator=generator).double() * 2 - 1


@cache
def _factor_sizes(order: int) -> tuple[int, ...] | None:
    """Return the orders of the factors whose Kronecker product is the matrix: a Paley matrix, and powers of two."""
    if order < 1:
        return None
    powers = (order & -order).bit_length() - 1  # how often 2 divides it
    odd = order >> powers
    if odd == 1:
        return _powers_of_two(powers) or (1,)
    for exponent in range(2, powers + 1):
        base = odd << exponent
        if base <= _LARGEST_PALEY and (_is_paley(base - 1, 3) or _is_paley(base // 2 - 1, 1)):
            return (base, *_powers_of_two(powers - exponent))
    return None


def _powers_of_two(exponent: int) -> tuple[int, ...]:
    parts = -(-exponent // _LARGEST_FACTOR_BITS)
    return tuple(2 ** ((exponent + i) // parts) for i in range(parts))


def _is_paley(q: int, remainder: int) -> bool:
    return q > 1 and q % 4 == remainder and all(q % d for d in range(2, math.isqrt(q) + 1))


@cache
def _factor(order: int) -> Tensor:
    """Return one factor, its rows multiplied by signs so that the first column is all 1."""
    matrix = _sylvester(order) if order & (order - 1) == 0 else _paley(order)
    return matrix * matrix[:, :1]


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(matrix, two)
    return matrix


def _paley(order: int) -> Tensor:
    """Return Paley's matrix of the first kind, ``q + 1``, or of the second, ``2 (q + 1)``."""
    if _is_paley(order - 1, 3):
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1, -1.0)
    half = order // 2
    c, unit = _conference(half - 1, 1.0), torch.eye(half, dtype=torch.float64)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(c, plus) + torch.kron(unit, minus)


def _conference(q: int, sign: float) -> Tensor:
    """Return the matrix ``C (q + 1, q + 1)`` of quadratic residues, ``C C^T = q``; symmetric (1) or skew (-1)."""
    residues = torch.full((q,), -1.0, dtype=torch.float64)
    residues[torch.arange(1, q) ** 2 % q] = 1.0
    residues[0] = 0.0
    index = torch.arange(q)
    c = torch.ones(q + 1, q + 1, dtype=torch.float64)
    c[0, 0] = 0.0
    c[1:, 0] = sign
    c[1:, 1:] = residues[(index[:, None] - index) % q]
    return c


# -- other orthogonal matrices -----------------------------------------------------------------------------------------


def orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix ``(width, width)`` float64, uniformly distributed."""
    q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def random_orthogonal(width: int, generator: torch.Generator) -> Rotation:
    """Return a rotation of vectors ``(width,)`` that is uniformly distributed: one dense factor."""
    return Rotation((orthogonal(width, generator),))


def random_kronecker(width: int, generator: torch.Generator) -> Rotation:
    """Return a random permutation, then the Kronecker product of two random orthogonal matrices of like size.

    As QuIP makes its matrices (arXiv 2307.13304, section 4): ``width^1.5`` operations and numbers instead of ``width^2``.
    """
    small = max(d for d in range(1, math.isqrt(width) + 1) if width % d == 0)
    order = torch.randperm(width, generator=generator)
    factors = (orthogonal(small, generator), orthogonal(width // small, generator))
    return Rotation(factors, order=order)


def keeping_the_mean(width: int, generator: torch.Generator, *, dense: bool = False) -> Rotation:
    """Return a random rotation that leaves the vector of ones, and so every mean over the entries, as it is.

    With ``P`` a Hadamard matrix whose first column is constant, ``R = P diag(1, ±1, …, ±1) P^T``; or, ``dense``, uniformly
    distributed among all that keep the ones.
    """
    if dense:
        # The reflection V swaps the first unit vector and the one along the ones; behind the first the rest is free.
        v = torch.full((width,), -1 / math.sqrt(width), dtype=torch.float64)
        v[0] += 1.0
        v = v / v.norm().clamp(min=1e-300)
        rest = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), orthogonal(width - 1, generator))
        reflect = torch.eye(width, dtype=torch.float64) - 2 * torch.outer(v, v)
        return Rotation((reflect @ rest @ reflect,))
    block = hadamard_block(width)
    p = hadamard(block) / math.sqrt(block)
    signs = random_signs(block, generator)
    signs[0] = 1.0
    return Rotation(((p * signs) @ p.T,))
