"""How figures are written: one way per unit, everywhere."""

from __future__ import annotations

import math

UNKNOWN = "–"
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def figure(value: float | None, unit: str = "", low: float | None = None, high: float | None = None) -> str:
    """Write a figure with its unit, and the ends of its interval if they are known.

    Parameters
    ----------
    value
        The figure; ``None`` is unknown.
    unit
        ``"bytes"`` (written in powers of 1000: 1 MB = 1e6 bytes), ``"s"``, ``"share"`` (written in percent),
        ``"tokens/s"``, ``"bits/weight"``, ``"nats/token"``, ``"ratio"``, or ``""`` for a plain number.
    low, high
        Ends of its interval, in the same unit.

    Examples
    --------
    >>> figure(134_515_008, "bytes")
    '134.5 MB'
    >>> figure(17.0534, "", 15.21, 19.1)
    '17.05 (15.21 to 19.10)'
    >>> figure(0.923, "share")
    '92.3 %'
    """
    if value is None:
        return UNKNOWN
    text = _written(value, unit)
    if low is None or high is None or low == high:
        return text
    ends = [_written(end, unit).removesuffix(f" {unit}").removesuffix(" %") for end in (low, high)]
    return f"{text} ({ends[0]} to {ends[1]})"


def _written(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "not finite"
    if unit == "bytes":
        size, name = next(((s, n) for s, n in _BYTES if abs(value) >= s), (1.0, "bytes"))
        return f"{value / size:.{0 if size == 1 else 1}f} {name}"
    if unit == "s":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds} s" if minutes else f"{value:.1f} s"
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "bits/weight":
        return f"{value:.2f} bits/weight"
    if unit == "ratio":
        return f"{value:.3f}"
    if unit == "tokens/s":
        return f"{_significant(value, 3)} tokens/s"
    return f"{_significant(value)} {unit}".rstrip()


def _significant(value: float, significant: int = 4) -> str:
    """Write that many significant digits, without an exponent from 0.0001 to 999,999."""
    if value == 0:
        return "0"
    digits = significant - 1 - math.floor(math.log10(abs(value)))
    if not -3 <= digits <= 7:
        return f"{value:.3e}"
    return f"{value:,.{max(digits, 0)}f}"


def bare(text: str, unit: str) -> str:
    """Leave out a unit that stands elsewhere, e.g. at the head of a table's row."""
    return text.replace(f" {unit}", "", 1) if unit else text


def change(before: float | None, after: float | None) -> str:
    """Write by how much something changed: percent while it is less than threefold, then a factor."""
    if before is None or after is None or not before or not math.isfinite(after / before):
        return ""
    ratio = after / before
    if abs(ratio - 1) < 0.0005:
        return "="
    if ratio >= 3:
        return f"x {ratio:.1f}"
    if 0 < ratio <= 1 / 3:
        return f"÷ {1 / ratio:.1f}"
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "−")
