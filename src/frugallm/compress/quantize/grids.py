"""Grids: where the representable values lie, and the nearest of them. Tensors in, tensors out.

A weight ``(out, in)`` is cut into groups of consecutive columns; group ``g`` of row ``r`` has a scale ``s`` and, when the
grid is asymmetric, a zero point ``z``; code ``q`` stands for ``s (q - z)``, on a float grid for ``s v`` with the ``q``-th
of its values. Scales are rounded to the type in which they are stored *before* any code is computed.

Where a scheme has two scales, those of groups are E4M3 numbers in units of one scale a tensor. That unit is a power of
two, so it changes no digit: weights are multiplied by it (:func:`in_units`), and everything else is as with one scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from frugallm.formats.quantized_tensor import QuantizedTensor, WeightScheme

Search = Literal["minmax", "mse"]
_ENTRIES_AT_ONCE = 2**19
_SHRINK = torch.linspace(0.6, 1.0, 17).tolist()
#: Of a float grid, whose values lie wider apart the larger they are, a wider range may be better, too.
_WIDEN = [1.05 + 0.05 * i for i in range(10)]
_LARGEST_E4M3, _SMALLEST_E4M3 = 448.0, 2.0**-9


def grouped(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """View ``(out, in)`` as ``(out, groups, columns)``."""
    return weight.view(weight.shape[0], -1, scheme.columns_per_scale(weight.shape[1]))


def stored(scale: Tensor, scheme: WeightScheme) -> Tensor:
    """Round scales to the type they are stored in; a group of zeros gets scale 1."""
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if scheme.scale_dtype == "float8_e8m0fnu":
        scale = power_of_two(scale)
    elif scheme.two_scales:
        scale = scale.clamp(_SMALLEST_E4M3, _LARGEST_E4M3)
    return scale.to(getattr(torch, scheme.scale_dtype))


def power_of_two(scale: Tensor) -> Tensor:
    """Return the smallest powers of two that are not below ``scale``, which is positive."""
    mantissa, exponent = torch.frexp(scale.float())  # mantissa in [0.5, 1)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.ldexp(torch.ones_like(mantissa), exponent.clamp(-126, 127))


def in_units(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """Return ``weight`` in units in which E4M3 holds the scales of its groups, and by how much it was multiplied.

    Returns
    -------
    tuple
        The weight times the unit, and the unit ``(1,)`` float32, a power of two; ``None`` with one kind of scale.
    """
    if not scheme.two_scales:
        return weight, None
    largest = weight.abs().max().clamp(min=1e-30) * (_WIDEN[-1] / scheme.reach)
    unit = 1 / power_of_two(largest.reshape(1) / _LARGEST_E4M3)
    return weight * unit, unit


def fit_symmetric(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Return scales ``(out, groups)`` that put the largest magnitude of a group on the end of the grid."""
    extreme = grouped(weight, scheme).abs().amax(-1)
    return stored(extreme / scheme.reach, scheme)


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
    if not scheme.symmetric:
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        return [_asymmetric(p * low, p * high, scheme) for p in _SHRINK]
    if scheme.grid != "int":
        plain = values.abs().amax(-1) / scheme.reach
        sizes = [0.5, 1.0, 2.0] if scheme.scale_dtype == "float8_e8m0fnu" else [*_SHRINK, *_WIDEN]
        return [(stored(plain * p, scheme), None) for p in sizes]
    index = values.abs().argmax(-1, keepdim=True)
    extreme = values.gather(-1, index)[..., 0]
    half = 2 ** (scheme.bits - 1)
    # The signed extreme on code -half: the scale carries the opposite sign.
    signed = [(stored(-extreme * p / half, scheme), None) for p in _SHRINK]
    return [*signed, (fit_symmetric(weight, scheme), None)]


def diagonal_blocks(second_moment: Tensor, scheme: WeightScheme) -> Tensor:
    """Return the blocks ``(groups, columns, columns)`` on the diagonal of ``(in, in)`` that belong to the groups."""
    width = second_moment.shape[0]
    size = scheme.columns_per_scale(width)
    return torch.stack([second_moment[i : i + size, i : i + size] for i in range(0, width, size)])


def _search(weight: Tensor, scheme: WeightScheme, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return best_of(weight, scheme, _candidates(weight, scheme), importance)


def best_of(
    weight: Tensor,
    scheme: WeightScheme,
    candidates: Iterable[tuple[Tensor, Tensor | None]],
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return for every group the scale and zero point, of those given, with the least squared rounding error.

    Parameters
    ----------
    candidates
        Scales ``(out, groups)`` in the stored type with zero points or ``None``; of equals the first is taken.
    importance
        As in :func:`fit`.
    """
    values = grouped(weight, scheme)
    cost = importance
    if cost is not None and cost.ndim == 1:
        cost = cost.view(-1, values.shape[-1])  # (groups, columns)
    best = torch.full(values.shape[:2], torch.inf)
    scale, zero = torch.empty(0), None
    for s, z in candidates:
        loss = _rounding_loss(values, s, z, scheme, cost)
        better = loss < best
        best = torch.where(better, loss, best)
        # In float32: not everything can be done with 8-bit floats.
        scale = s.float() if scale.numel() == 0 else torch.where(better, s.float(), scale)
        if z is not None:
            zero = z if zero is None else torch.where(better, z, zero)
    return scale.to(getattr(torch, scheme.scale_dtype)), zero


def _rounding_loss(
    values: Tensor, scale: Tensor, zero: Tensor | None, scheme: WeightScheme, cost: Tensor | None
) -> Tensor:
    """Return the squared rounding error of each group, ``(out, groups)``, of ``values (out, groups, columns)``.

    ``cost`` is ``(groups, columns)`` or ``(groups, columns, columns)``.
    """
    step = scale.float()[..., None]
    exact = values / step
    if zero is None:
        nearest = scheme.values(scheme.nearest(exact.clone()))
    else:
        low, high = scheme.code_range
        shift = zero.float()[..., None]
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
    if zero is None:
        return scheme.nearest(values).view_as(weight).to(torch.int8)
    values = values.round_() + zero.float()[..., None]
    return values.clamp_(*scheme.code_range).view_as(weight).to(torch.int8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return the values, ``(out, in)`` float32, that ``codes`` on a grid of integers stand for."""
    values = codes.view(codes.shape[0], scale.shape[1], -1).float()
    if zero is not None:
        values = values - zero.float()[..., None]
    return (values * scale.float()[..., None]).view(codes.shape)


def round_to_nearest(
    weight: Tensor, scheme: WeightScheme, search: Search = "minmax", importance: Tensor | None = None
) -> QuantizedTensor:
    """Store every weight at its nearest grid value."""
    weight, unit = in_units(weight.float().contiguous(), scheme)
    scale, zero = fit(weight, scheme, search, importance)
    return QuantizedTensor(encode(weight, scale, zero, scheme), scale, zero, scheme, unit=unit)


def nearest_on(q: QuantizedTensor, weight: Tensor) -> QuantizedTensor:
    """Return ``weight`` ``(out, in)`` rounded to nearest on the very grid of ``q``, scales and all but the extras."""
    weight = weight if q.unit is None else weight * q.unit
    return replace(q, codes=encode(weight, q.scale, q.zero, q.scheme), extras=())
