"""Means and paired differences of a study's records, as numbers and as tables."""

from __future__ import annotations

from diffportrait3d.portraits.detector import INSTALL

from ..metrics.faces import FACE_METRICS, OTHERS
from ..metrics.images import LARGEST_PSNR
from ..metrics.metric import Metric
from .bootstrap import Interval, bootstrap_difference, bootstrap_mean
from .report import cell, markdown_table
from .results_log import column

Intervals = dict[str, dict[str, Interval]]  # by row and metric
Metrics = dict[str, Metric]


def means(records: list[dict], rows, metrics: Metrics) -> Intervals:
    """Per row and metric, over identities."""
    return {row: {m: bootstrap_mean(column(records, row, m)) for m in metrics} for row in rows}


def differences(records: list[dict], baseline: str, rows, metrics: Metrics) -> Intervals:
    """Of the baseline minus each other row, paired by identity."""
    return {
        row: {m: bootstrap_difference(column(records, baseline, m), column(records, row, m)) for m in metrics}
        for row in rows
        if row != baseline
    }


def mean_table(found: Intervals, metrics: Metrics, titles: dict[str, str]) -> str:
    rows = [[titles[row], *(_mean(values[m], m, metrics) for m in metrics)] for row, values in found.items()]
    return markdown_table(["", *(metric.title for metric in metrics.values())], rows)


def _mean(interval: Interval, name: str, metrics: Metrics) -> str:
    """ "none" for the PSNR of equal images, which is infinite."""
    equal = name.endswith("psnr") and interval.low >= LARGEST_PSNR
    return "none" if equal else cell(interval, metrics[name].digits)


def difference_table(found: Intervals, baseline: str, metrics: Metrics, titles: dict[str, str]) -> str:
    """A row per row of `found`, with signs."""
    rows = [
        [f"{baseline} - {titles[row]}", *(cell(values[m], metric.digits, True) for m, metric in metrics.items())]
        for row, values in found.items()
    ]
    return markdown_table(["", *(metric.title for metric in metrics.values())], rows)


def face_table(records: list[dict], titles: dict[str, str], measured: bool) -> str:
    """What dlib says about every row, with its baselines; without the packages, how to get them."""
    if not measured:
        return f"Faces and ID were not measured (--faces; {INSTALL})."
    titles = titles | {OTHERS: "true views of other people"}
    return (
        "Faces by dlib (not ArcFace); ID and distance over views in which a face is found; the right person comes "
        f"first among {len(records)} by chance in {1 / len(records):.3f} of the views.\n\n"
        + mean_table(means(records, titles, FACE_METRICS), FACE_METRICS, titles)
    )


def as_dicts(found: Intervals) -> dict[str, dict[str, dict]]:
    return {row: {m: interval._asdict() for m, interval in values.items()} for row, values in found.items()}
