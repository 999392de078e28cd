"""Intervals and medians of what is reported."""

from __future__ import annotations

import math
import statistics as std
from collections.abc import Sequence

__all__ = ["median_and_spread", "wilson_interval"]


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 % by default)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and half of the interquartile range."""
    if len(values) < 2:
        return (values[0] if values else math.nan), 0.0
    quartiles = std.quantiles(values, n=4, method="inclusive")
    return quartiles[1], (quartiles[2] - quartiles[0]) / 2
