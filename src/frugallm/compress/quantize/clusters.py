"""Clusters of channels that are rounded on one grid: which channels, and which grid. Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

#: A zero point has 16 bits, so a step is no smaller than this share of the largest value.
_LEAST_STEP = 2.0**-14


def k_means(points: Tensor, clusters: int, *, starts: int = 10, rounds: int = 100, seed: int = 0) -> Tensor:
    """Return to which cluster each of the ``points (n, d)`` belongs, ``(n,)`` int64.

    Lloyd's algorithm from ``starts`` random beginnings (k-means++), of which the best result is kept. The same points
    give the same clusters. Where fewer than ``clusters`` points are distinct, some clusters stay empty.
    """
    points = points.double()
    generator = torch.Generator().manual_seed(seed)
    best, least = torch.zeros(len(points), dtype=torch.int64), torch.inf
    for _ in range(starts):
        centers = _beginning(points, clusters, generator)
        labels = _nearest(points, centers)
        for _ in range(rounds):
            sums = torch.zeros_like(centers).index_add_(0, labels, points)
            counts = labels.bincount(minlength=len(centers))[:, None]
            centers = torch.where(counts > 0, sums / counts.clamp(min=1), centers)
            before, labels = labels, _nearest(points, centers)
            if torch.equal(before, labels):
                break
        spread = float((points - centers[labels]).square().sum())
        if spread < least:
            best, least = labels, spread
    return best


def _beginning(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Return up to ``clusters`` of the points, each chosen by its squared distance from those before it."""
    first = int(torch.randint(len(points), (1,), generator=generator))
    centers, far = [points[first]], (points - points[first]).square().sum(1)
    while len(centers) < clusters and bool(far.any()):
        chosen = points[int(torch.multinomial(far, 1, generator=generator))]
        centers.append(chosen)
        far = torch.minimum(far, (points - chosen).square().sum(1))
    return torch.stack(centers)


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    return torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def cluster_grid(
    extremes: Tensor, labels: Tensor, clusters: int, code_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return scale, float32, and zero point, int16, of each cluster ``(clusters,)`` that cover its channels' ranges.

    Zero need not be on the grid: a cluster whose channels are all far from it has all of its codes where they are.

    Parameters
    ----------
    extremes
        Smallest and largest values of the channels, ``(2, in)``.
    labels
        Cluster of each channel, ``(in,)`` int64.
    code_range
        Smallest and largest code.
    """
    first, last = code_range
    ends = torch.zeros(2, clusters)
    for row, how in ((0, "amin"), (1, "amax")):
        ends[row].scatter_reduce_(0, labels, extremes[row].float(), how, include_self=False)
    low, high = ends
    scale = torch.maximum((high - low) / (last - first), ends.abs().amax(0) * _LEAST_STEP).clamp(min=1e-8)
    return scale, torch.round(first - low / scale).to(torch.int16)
