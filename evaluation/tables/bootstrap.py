"""Confidence intervals by resampling identities, which are the independent units (views of one are not)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES, LEVEL = 10_000, 0.95


class Interval(NamedTuple):
    """Mean over `count` identities with the ends of its bootstrap interval. All NaN if nothing was measured."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_mean(values, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """95 % percentile bootstrap of the mean (Efron 1979).

    values: one number per identity; NaN marks an identity where the quantity does not exist, and is left out of
    `count`. The same seed and count give the same resamples.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [values[rng.integers(len(values), size=(1000, len(values)))].mean(1) for _ in range(-(-resamples // 1000))]
    )[:resamples]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def bootstrap_difference(first, second) -> Interval:
    """Interval of the mean of first - second, paired by identity: what both share (hard subjects) cancels."""
    return bootstrap_mean(np.subtract(first, second, dtype=np.float64))
