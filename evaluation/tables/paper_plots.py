"""A panel per metric: every setting with its interval, and the paper's own figure for it."""

from __future__ import annotations

import math
from pathlib import Path

from diffportrait3d.files import write_atomically

from ..metrics.networks import PAPER_METRICS
from .paper_tables import Measured, rows_for

COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#762a83", "#e08214", "#4d4d4d")
OURS = ("DiffPortrait3D", "3D-aware noise", "reference aligned", "reference unaligned")  # rows of the paper's system


def save_plots(results: list[Measured], path: Path) -> None:
    """One PNG. Nothing to show: no file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in PAPER_METRICS if any(name in result.intervals for result in results)]
    if not names:
        return
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4 * columns, (0.35 * len(results) + 1.2) * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axis, name in zip(axes, names, strict=False):
        _panel(axis, results, name)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    legend = "bars: 95 % intervals over identities; x: the paper, on its own data (not beside enlarged views)"
    figure.suptitle(legend, fontsize=9)
    FigureCanvasAgg(figure)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _panel(axis, results: list[Measured], name: str) -> None:
    metric = PAPER_METRICS[name]
    for height, result in enumerate(reversed(results)):
        colour = COLOURS[height % len(COLOURS)]
        if interval := result.intervals.get(name):
            spread = [[interval.mean - interval.low], [interval.high - interval.mean]]
            axis.errorbar([interval.mean], [height], xerr=spread, fmt="o", color=colour, capsize=3)
        for row in rows_for(result.task, result.size, result.background, result.reference):
            number = row.numbers.get(metric.paper)
            fits = row.method in OURS and row.data == "NeRSemble" and row.reference == result.reference
            if fits and number is not None and result.native >= result.size:
                axis.plot([number], [height], "x", color=colour)
    short = [
        f"{r.task[:5]}, {r.reference}, {r.size}" + (", cut out" if r.background == "without" else "")
        for r in reversed(results)
    ]
    axis.set_yticks(range(len(results)), short, fontsize=7)
    axis.set_ylim(-0.6, len(results) - 0.4)
    axis.set_title(f"{metric.title} ({'more' if metric.more_is_better else 'less'} is better)", fontsize=9)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(alpha=0.3)
