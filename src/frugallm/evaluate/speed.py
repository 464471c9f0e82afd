"""A rate measured several times, as reports hold it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict


class Rate(BaseModel):
    """A rate measured several times: median, slowest and fastest, in ``unit``."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float
    repeats: int
    unit: str = "tokens/s"

    @classmethod
    def of(cls, values: Sequence[float], unit: str = "tokens/s") -> Rate:
        """Sum up what several runs gave."""
        return cls(
            value=statistics.median(values), low=min(values), high=max(values), repeats=len(values), unit=unit
        )
