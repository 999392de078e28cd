"""Intervals and medians of what is reported."""

from __future__ import annotations

import math
import statistics as std
from collections.abc import Sequence

import numpy as np

__all__ = [
    "cluster_bootstrap",
    "median_and_spread",
    "paired_interval",
    "paired_wald_interval",
    "wilson_interval",
]

_Z = 1.96
_RESAMPLES = 2000


def wilson_interval(successes: int, n: int, z: float = _Z) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 % by default)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_wald_interval(
    only_first: int, only_second: int, n: int, z: float = _Z
) -> tuple[float, float]:
    """Interval of p(first) - p(second) from pairs (Bonett and Price, 2012).

    `only_first` of `n` pairs are right in the first alone, `only_second` in the second alone. One
    pair is added to each of both, so that no difference seen does not mean none possible.
    """
    if n == 0:
        return -1.0, 1.0
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = z * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    return max(-1.0, first - second - half), min(1.0, first - second + half)


def cluster_bootstrap(
    values: Sequence[float], clusters: Sequence[int], *, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`, resampling whole clusters.

    Questions of one prompt share its documents and are no independent draws; prompts are.
    """
    if not len(values):
        return math.nan, math.nan
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(index, weights=np.asarray(values, float)), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(_RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_interval(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[int], *, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of mean(first) - mean(second) over the same questions.

    The cluster bootstrap's; for scores that are 0 or 1, widened to hold `paired_wald_interval`
    too, which does not shrink to nothing where few pairs differ.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    low, high = cluster_bootstrap((a - b).tolist(), clusters, seed=seed)
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        wald = paired_wald_interval(int((a > b).sum()), int((b > a).sum()), len(a))
        low, high = float(np.fmin(low, wald[0])), float(np.fmax(high, wald[1]))
    return low, high


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and half of the interquartile range."""
    if len(values) < 2:
        return (values[0] if values else math.nan), 0.0
    quartiles = std.quantiles(values, n=4, method="inclusive")
    return quartiles[1], (quartiles[2] - quartiles[0]) / 2
