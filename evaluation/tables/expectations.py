"""The orders that the paper reports (`expectations.csv`), written down before they were looked for, and the verdict on
each.

Nothing there may be changed after results were seen, except by adding a line that says so. Changed after a trial with
two people and three steps, before any result that counts: the variants with other numbers of steps became relative to
the command's (they were 5 and 50), and fewer than FEWEST people decide nothing. Changed before it was ever run: ordered
views are compared with shuffled ones of a module that has positions, not with the full system's, which has none. Added
after 34 people had shown that training on ordered views does no harm here: the line that asks whether such a module
heeds the order at all. Added before any generated view was measured by dlib: the paper's ID column, by cosine to the
portrait and to the truth and by the rank of the right person; where the paper's ID is equal, by distance, as dlib's
cosines of different people already lie within 5 % of one another.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..metrics.faces import FACE_METRICS
from ..metrics.views import ABLATION_METRICS
from .bootstrap import Interval, bootstrap_difference, bootstrap_mean
from .results_log import column

BETTER, EQUAL, SMALL = "better than", "equal to", "below"


@dataclass(frozen=True)
class Expectation:
    """One order.

    Attributes:
        source: the place in the paper, or why it follows.
        first, second: names of variants; `second` is empty if `relation` is SMALL.
        metrics: each has its own verdict; the first one is the paper's nearest.
        relation: BETTER: the paired difference has the right sign. EQUAL: it lies within +-margin of the second
            variant's mean. SMALL: the first variant's number itself lies within +-margin.
        margin: a part of the mean for EQUAL, in the metric's unit for SMALL.
    """

    source: str
    first: str
    relation: str
    second: str
    metrics: tuple[str, ...]
    margin: float = 0.0

    @property
    def variants(self) -> set[str]:
        return {self.first, self.second} - {""}


FEWEST = 10  # identities that a verdict takes; the bootstrap of fewer is far too narrow


def _read() -> tuple[Expectation, ...]:
    """`expectations.csv`; lines with # say what the next ones are about."""
    lines = Path(__file__).with_suffix(".csv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if line[0] != "#")
    return tuple(
        Expectation(**row | {"metrics": tuple(row["metrics"].split()), "margin": float(row["margin"] or 0)})
        for row in rows
    )


EXPECTATIONS = _read()


class Verdict(NamedTuple):
    """`interval` is the paired difference, turned so that positive is what was expected (EQUAL and SMALL: as it is),
    `allowed` the margin in the metric's unit, `word` one of holds, does not, undecided."""

    expectation: Expectation
    metric: str
    interval: Interval
    allowed: float
    word: str


def verdict(expectation: Expectation, metric: str, records: list[dict]) -> Verdict:
    """The verdict by the 95 % paired bootstrap interval over identities."""
    first = column(records, expectation.first, metric)
    if expectation.relation == SMALL:
        return _within(expectation, metric, bootstrap_mean(first), expectation.margin)
    second = column(records, expectation.second, metric)
    if expectation.relation == EQUAL:
        allowed = expectation.margin * abs(bootstrap_mean(second).mean)
        return _within(expectation, metric, bootstrap_difference(first, second), allowed)
    pair = (first, second) if (ABLATION_METRICS | FACE_METRICS)[metric].more_is_better else (second, first)
    interval = bootstrap_difference(*pair)
    return Verdict(expectation, metric, interval, 0.0, _word(interval, interval.low > 0, interval.high < 0))


def _within(expectation: Expectation, metric: str, interval: Interval, allowed: float) -> Verdict:
    inside = -allowed <= interval.low and interval.high <= allowed
    outside = interval.high < -allowed or interval.low > allowed
    return Verdict(expectation, metric, interval, allowed, _word(interval, inside, outside))


def _word(interval: Interval, holds: bool, fails: bool) -> str:
    if interval.count < FEWEST:
        return "undecided"
    return "holds" if holds else "does not" if fails else "undecided"


def verdicts(records: list[dict], variants: set[str]) -> list[Verdict]:
    """Every expectation whose variants were all run, metric by metric; without metrics that were not measured."""
    chosen = [expectation for expectation in EXPECTATIONS if expectation.variants <= variants]
    measured = set(records[0]["results"]["full"])
    return [verdict(e, metric, records) for e in chosen for metric in e.metrics if metric in measured]
