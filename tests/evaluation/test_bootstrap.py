"""Intervals: their width, their coverage, and what pairing buys."""

import math

import numpy as np
import pytest

from evaluation.tables.bootstrap import bootstrap_difference, bootstrap_mean


def test_width_is_the_standard_error():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    interval = bootstrap_mean(values)
    expected = 1.96 * values.std() / math.sqrt(400)
    assert interval.mean == pytest.approx(values.mean()) and interval.count == 400
    assert interval.high - interval.mean == pytest.approx(expected, rel=0.06)
    assert interval.mean - interval.low == pytest.approx(expected, rel=0.06)


def test_coverage():
    """95 % intervals of 60 skewed values contain the true mean about 95 times in 100."""
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(300):
        interval = bootstrap_mean(rng.exponential(1.0, 60), resamples=1000, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.89 <= hits / 300 <= 0.98


def test_pairing_cancels_what_is_shared():
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 10, 50)
    full, arm = difficulty + rng.normal(0, 0.1, 50), difficulty + 1 + rng.normal(0, 0.1, 50)
    paired = bootstrap_difference(full, arm)
    assert paired.low < -1 < paired.high and paired.high < -0.9
    assert bootstrap_mean(full).low < bootstrap_mean(arm).mean < bootstrap_mean(full).high


def test_missing_and_degenerate_values():
    assert bootstrap_mean([1.0, float("nan"), 3.0]).count == 2
    assert bootstrap_mean([2.0]) == (2.0, 2.0, 2.0, 1)
    empty = bootstrap_mean([float("nan")])
    assert empty.count == 0 and math.isnan(empty.mean)
    assert bootstrap_difference([1.0, float("nan")], [0.5, 0.5]).count == 1
    assert bootstrap_mean(np.arange(20.0)) == bootstrap_mean(np.arange(20.0))
