"""Integer grids: where the representable values lie, and the nearest of them. Tensors in, tensors out.

A weight ``(out, in)`` is cut into groups of consecutive columns; group ``g`` of row ``r`` has a scale ``s`` and, when the
grid is asymmetric, a zero point ``z``; code ``q`` stands for ``s (q - z)``. Scales are rounded to the type in which they
are stored *before* any code is computed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme

Search = Literal["minmax", "mse"]
_ENTRIES_AT_ONCE = 2**19


def grouped(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """View ``(out, in)`` as ``(out, groups, columns)``."""
    return weight.view(weight.shape[0], -1, scheme.columns_per_scale(weight.shape[1]))


def stored(scale: Tensor, scheme: WeightScheme) -> Tensor:
    """Round scales to the type they are stored in; a group of zeros gets scale 1."""
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale.to(getattr(torch, scheme.scale_dtype))


def fit_symmetric(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Return scales ``(out, groups)`` that map the largest magnitude of a group to ``(2^b - 1) / 2`` codes."""
    extreme = grouped(weight, scheme).abs().amax(-1)
    return stored(extreme / ((2**scheme.bits - 1) / 2), scheme)


def fit_asymmetric(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Return scales and zero points ``(out, groups)`` that cover each group's range, zero included."""
    values = grouped(weight, scheme)
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    return _asymmetric(low, high, scheme)


def _asymmetric(low: Tensor, high: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    first, last = scheme.code_range
    scale = stored((high - low) / (last - first), scheme)
    zero = torch.round(first - low / scale.float()).clamp(first, last)
    return scale, zero.to(torch.int8)


def fit(
    weight: Tensor, scheme: WeightScheme, search: Search = "minmax", importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Choose scale and zero point of every group.

    Parameters
    ----------
    weight
        ``(out, in)`` float32.
    search
        ``"minmax"``: the group's range. ``"mse"``: of a list of candidate ranges the one with the least squared rounding
        error; symmetric candidates come with either sign, so that the extreme value may use the one extra code at
        ``-2^(b-1)``, at no cost.
    importance
        ``(in,)`` weights of the squared error, for instance the mean square of each input channel; or ``(groups,
        columns, columns)`` blocks of a second moment (:func:`diagonal_blocks`): the squared error of what each group
        contributes to the output, correlations within the group included.

    Returns
    -------
    tuple
        ``scale (out, groups)`` in the stored type and ``zero (out, groups)`` int8 or ``None``.
    """
    if search == "mse":
        # Some rows at a time: what the many candidates leave behind stays in the processor's cache.
        rows = max(1, _ENTRIES_AT_ONCE // weight.shape[1])
        found = [_search(piece, scheme, importance) for piece in weight.split(rows)]
        scales, zeros = zip(*found)
        return torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)
    if scheme.symmetric:
        return fit_symmetric(weight, scheme), None
    return fit_asymmetric(weight, scheme)


def fit_second_level(values: Tensor, scheme: WeightScheme) -> QuantizedTensor:
    """Round scales or zero points ``(groups, out)`` on grids over their range, each of consecutive outputs of a group.

    Rows are filled up to whole groups with their last value. A step is no finer than 1/2048 of the largest value: that
    is what the float16 zero point of such a grid resolves.
    """
    padded = functional.pad(values[None], (0, -values.shape[1] % (scheme.group_size or 1)), mode="replicate")[
        0
    ]
    chunks = grouped(padded, scheme)
    low, high = chunks.amin(-1), chunks.amax(-1)
    first, last = scheme.code_range
    finest = torch.maximum(low.abs(), high.abs()) / 2048
    step = stored(torch.maximum((high - low) / (last - first), finest), scheme)
    zero = (first - low / step.float()).to(getattr(torch, scheme.zero_dtype))
    return QuantizedTensor(encode(padded, step, zero, scheme), step, zero, scheme)


def _candidates(weight: Tensor, scheme: WeightScheme) -> list[tuple[Tensor, Tensor | None]]:
    values = grouped(weight, scheme)
    shrink = torch.linspace(0.6, 1.0, 17).tolist()
    if not scheme.symmetric:
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        return [_asymmetric(p * low, p * high, scheme) for p in shrink]
    index = values.abs().argmax(-1, keepdim=True)
    extreme = values.gather(-1, index)[..., 0]
    half = 2 ** (scheme.bits - 1)
    # The signed extreme on code -half: the scale carries the opposite sign.
    signed = [(stored(-extreme * p / half, scheme), None) for p in shrink]
    return [*signed, (fit_symmetric(weight, scheme), None)]


def diagonal_blocks(second_moment: Tensor, scheme: WeightScheme) -> Tensor:
    """Return the blocks ``(groups, columns, columns)`` on the diagonal of ``(in, in)`` that belong to the groups."""
    width = second_moment.shape[0]
    size = scheme.columns_per_scale(width)
    return torch.stack([second_moment[i : i + size, i : i + size] for i in range(0, width, size)])


def _search(weight: Tensor, scheme: WeightScheme, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    values = grouped(weight, scheme)
    cost = importance
    if cost is not None and cost.ndim == 1:
        cost = cost.view(-1, values.shape[-1])  # (groups, columns)
    best = torch.full(values.shape[:2], torch.inf)
    scale, zero = torch.empty(0), None
    for s, z in _candidates(weight, scheme):
        loss = _rounding_loss(values, s, z, scheme, cost)
        better = loss < best
        best = torch.where(better, loss, best)
        scale = s if scale.numel() == 0 else torch.where(better, s, scale)
        if z is not None:
            zero = z if zero is None else torch.where(better, z, zero)
    return scale, zero


def _rounding_loss(
    values: Tensor, scale: Tensor, zero: Tensor | None, scheme: WeightScheme, cost: Tensor | None
) -> Tensor:
    """Return the squared rounding error of each group, ``(out, groups)``, of ``values (out, groups, columns)``.

    ``cost`` is ``(groups, columns)`` or ``(groups, columns, columns)``.
    """
    step = scale.float()[..., None]
    exact = values / step
    shift = torch.zeros_like(step) if zero is None else zero.float()[..., None]
    low, high = scheme.code_range
    nearest = exact.round().clamp_(low - shift, high - shift)
    error = nearest.sub_(exact)
    if cost is not None and cost.ndim == 3:
        weighted = torch.bmm(error.transpose(0, 1), cost).transpose(0, 1)  # (out, groups, columns)
        return weighted.mul_(error).sum(-1) * step[..., 0].square()
    error.square_()
    if cost is not None:
        error.mul_(cost)
    return error.sum(-1) * step[..., 0].square()


def encode(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: WeightScheme) -> Tensor:
    """Return the nearest codes, ``(out, in)`` int8, of ``weight`` ``(out, in)``."""
    values = weight.view(weight.shape[0], scale.shape[1], -1) / scale.float()[..., None]
    if zero is not None and zero.is_floating_point():  # codes are whole, not their distance to the zero point
        values += zero.float()[..., None]
        zero = None
    values = values.round_()
    if zero is not None:
        values = values + zero.float()[..., None]
    return values.clamp_(*scheme.code_range).view_as(weight).to(torch.int8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return the values, ``(out, in)`` float32, that ``codes`` stand for."""
    values = codes.view(codes.shape[0], scale.shape[1], -1).float()
    if zero is not None:
        values = values - zero.float()[..., None]
    return (values * scale.float()[..., None]).view(codes.shape)


def round_to_nearest(
    weight: Tensor, scheme: WeightScheme, search: Search = "minmax", importance: Tensor | None = None
) -> QuantizedTensor:
    """Store every weight at its nearest grid value."""
    weight = weight.float().contiguous()
    scale, zero = fit(weight, scheme, search, importance)
    return QuantizedTensor(encode(weight, scale, zero, scheme), scale, zero, scheme)
