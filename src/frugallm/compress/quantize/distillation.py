"""Training of codes: the stored weights of one block are moved until it computes what the original block does.

Scales, zero points and everything else stored stay as the solver left them. What is trained is where each weight lies
between the codes: a *latent*, in steps of its own grid. The forward rounds it, the gradient passes straight through, and
the codes that come out are the rounded latents. So whoever solved the block may be distilled, on any grid of integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frugallm.formats.quantized_tensor import QuantizedTensor
from frugallm.formats.rounded_inputs import nearest
from frugallm.walk.reconstruction import Reconstructed, Reconstruction, Streams

#: Turns what is trained into latents ``(out, in)``, in steps of the grid, by path.
Latents = Callable[[], Mapping[str, Tensor]]

BETAS = (0.9, 0.95)
#: Gradients of single weights are tiny beside the default.
EPS = 1e-12
JUDGED = 4


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes
    ----------
    steps
        Steps of the optimizer (Adam); its rate falls to zero over them.
    rate
        What the first steps may move a parameter by.
    batch
        Windows a step.
    streams
        Which hidden states block and original read.
    """

    steps: int
    rate: float
    batch: int
    streams: Streams


def latent(weight: Tensor, q: QuantizedTensor) -> Tensor:
    """Return where ``weight`` ``(out, in)`` lies on the grid of ``q``, in steps: codes before they are rounded.

    A solver may have chosen another code than the nearest. Such entries begin in the middle of their code.
    """
    exact = q.scheme.places(weight.view(len(weight), q.scale.shape[1], -1) / q.step[..., None])
    if q.zero is not None:
        exact = exact + q.zero.float()[..., None]
    exact = exact.view_as(weight).clamp(*q.scheme.code_range)
    codes = q.codes.float()
    return torch.where(exact.round() == codes, exact, codes)


def rounded(latents: Tensor, q: QuantizedTensor, frozen: Tensor | None = None) -> QuantizedTensor:
    """Return ``q`` with the codes next to ``latents`` ``(out, in)``, as floats through which gradients pass.

    Entries of ``frozen``, bool ``(out, in)``, keep their codes.
    """
    codes = nearest(latents).clamp(*q.scheme.code_range)
    if frozen is not None:
        codes = torch.where(frozen, q.codes.float(), codes)
    return replace(q, codes=codes)


def error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the squared error of each token relative to the token's own square, ``(windows, length, width)`` to a number.

    The next block normalizes every token by its own size. Without that, one token of a window outweighs all others: the
    first, whose hidden state is some thousand times larger than the rest.
    """
    size = targets.square().sum(-1).clamp(min=1e-12)
    return ((outputs - targets).square().sum(-1) / size).mean()


def distill(
    task: Reconstruction, parameters: list[Tensor], latents: Latents, schedule: Schedule
) -> Reconstructed:
    """Train ``parameters`` until the block's outputs are near those of the original block.

    Parameters
    ----------
    parameters
        What is trained, in place.
    latents
        Returns the latents by path that the parameters, as they then are, stand for.

    Returns
    -------
    Reconstructed
        Stored forms by path, those of the moment with the least error on the held-out windows, which may be the first;
        and that error at the beginning and at that moment.
    """
    train, held = task.windows()
    generator = torch.Generator().manual_seed(task.seed)
    optimizer = torch.optim.Adam(parameters, lr=schedule.rate, betas=BETAS, eps=EPS)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max(1, schedule.steps))
    first = least = _held_out_error(task, dict(task.linears), held, schedule)
    best = dict(task.linears)
    queue = torch.empty(0, dtype=torch.long)
    for step in range(1, schedule.steps + 1):
        if len(queue) < min(schedule.batch, len(train)):
            queue = train[torch.randperm(len(train), generator=generator)]
        batch, queue = queue[: schedule.batch], queue[schedule.batch :]
        with task.learning():
            read, original = task.inputs(schedule.streams, batch)
            loss = error(task.outputs(read, _weights(task, latents())), task.targets(original))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step % max(1, schedule.steps // JUDGED) == 0 or step == schedule.steps:
            now = _whole(task, latents)
            found = _held_out_error(task, now, held, schedule)
            if found < least:
                best, least = now, found
    return Reconstructed(best, first, least)


def _weights(task: Reconstruction, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {p: rounded(v, task.linears[p], task.frozen.get(p)).dequantize() for p, v in latents.items()}


@torch.no_grad()
def _whole(task: Reconstruction, latents: Latents) -> dict[str, QuantizedTensor]:
    """Return what would be stored now."""
    found = {p: rounded(v, task.linears[p], task.frozen.get(p)) for p, v in latents().items()}
    return {p: replace(q, codes=q.codes.to(torch.int8)) for p, q in found.items()}


def _held_out_error(
    task: Reconstruction, linears: Mapping[str, QuantizedTensor], held: Tensor, schedule: Schedule
) -> float:
    weights = {path: q.dequantize() for path, q in linears.items()}
    total = 0.0
    for windows in held.split(schedule.batch):
        with task.learning(), torch.no_grad():
            read, original = task.inputs(schedule.streams, windows)
            total += float(error(task.outputs(read, weights), task.targets(original))) * len(windows)
    return total / len(held)


def distill_codes(task: Reconstruction, schedule: Schedule) -> Reconstructed:
    """Train every weight's place between the codes; see :func:`distill`."""
    places = {}
    for path, q in task.linears.items():
        # Extras may have changed the basis, in which the weight is not known here: then all begin in their middle.
        place = q.codes.float() if q.extras else latent(task.weights[path], q)
        places[path] = place.requires_grad_()
    return distill(task, list(places.values()), lambda: places, schedule)


def distill_low_rank(
    task: Reconstruction,
    rank: int,
    schedule: Schedule,
    columns: Callable[[Tensor, QuantizedTensor], Tensor],
) -> Reconstructed:
    """Train a change ``A B`` of every weight's place between the codes, with ``A (out, rank)`` and ``B (rank, in)``.

    ``columns(weight, stored)`` returns a weight in the columns in which it is stored. ``A`` begins at zero, so that
    nothing changes at first.
    """
    generator = torch.Generator().manual_seed(task.seed)
    start, factors = {}, {}
    for path, q in task.linears.items():
        start[path] = latent(columns(task.weights[path], q), q)
        rows, width = q.codes.shape
        b = torch.randn(rank, width, generator=generator) / rank**0.5
        factors[path] = torch.zeros(rows, rank).requires_grad_(), b.requires_grad_()
    parameters = [factor for pair in factors.values() for factor in pair]
    return distill(task, parameters, lambda: {p: start[p] + a @ b for p, (a, b) in factors.items()}, schedule)
