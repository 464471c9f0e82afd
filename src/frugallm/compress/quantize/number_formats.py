"""Number formats of weights by the name that engines give them, for methods that round on any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from frugallm.compress.contract import resolve_group_size
from frugallm.errors import ParameterError
from frugallm.formats.levels import BITS
from frugallm.formats.quantized_tensor import WeightScheme

NumberFormat = Literal["int", "mxfp4", "fp4", "fp8", "nvfp4"]
DESCRIPTION = (
    "what codes stand for: int; fp4 or fp8 with scales in bf16; mxfp4 (groups of 32, scales powers of two); "
    "nvfp4 (groups of 16, scales in fp8)"
)

#: Grid, type of scales, and the one group size that the format allows.
_FORMATS: dict[str, tuple[str, str, int | None]] = {
    "fp4": ("e2m1", "bfloat16", None),
    "fp8": ("e4m3", "bfloat16", None),
    "mxfp4": ("e2m1", "float8_e8m0fnu", 32),
    "nvfp4": ("e2m1", "float8_e4m3fn", 16),
}


def scheme_for(
    method: str,
    number_format: NumberFormat,
    widths: Mapping[str, int],
    *,
    bits: int,
    symmetric: bool,
    group_size: int | None,
) -> WeightScheme:
    """Return the scheme of linears of these input widths (name to width) in a number format.

    ``group_size`` left open is that of the format, for ``fp8`` a whole row, else what fits.

    Raises
    ------
    ParameterError
        If the parameters contradict the format, or do not fit a width.
    """
    if number_format == "int":
        group = resolve_group_size(method, group_size, widths)
        return WeightScheme(bits=bits, symmetric=symmetric, group_size=group)
    grid, scale_dtype, only = _FORMATS[number_format]
    if bits != BITS[grid]:
        raise ParameterError(
            f"{method}: grid={number_format} has {BITS[grid]} bits, not {bits}", f"Say bits={BITS[grid]}"
        )
    if not symmetric:
        raise ParameterError(f"{method}: grid={number_format} has no zero point", "Leave symmetric out")
    if only is not None and group_size not in (None, only):
        raise ParameterError(
            f"{method}: grid={number_format} has groups of {only}, not group_size={group_size}",
            "Leave group_size out, or use grid=fp4",
        )
    if group_size is None:
        group_size = -1 if number_format == "fp8" else only
    group = resolve_group_size(method, group_size, widths)
    fields: dict[str, Any] = {"grid": grid, "scale_dtype": scale_dtype}
    return WeightScheme(bits=bits, group_size=group, **fields)
