"""A setting's metrics beside the paper's own figures for it (Gu et al., CVPR 2024)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..metrics.networks import PAPER_METRICS, SET_METRICS
from .bootstrap import Interval
from .report import cell, markdown_table

NAMES = ("lpips", "ssim", "dists", "id", "fid", "pose")


@dataclass(frozen=True)
class Row:
    """A line of the paper's Tables 1 to 3 (novel portrait synthesis), typed into `paper_figures.csv`, in its setting.

    task: "reconstruction" or "novel". size: pixels. background: "with" or "without". reference: "aligned" or
    "unaligned". numbers: by NAMES; what the paper leaves out is absent. The paper does not say which LPIPS net it is,
    how many images FID counts, nor whether POSE is a mean square or a norm (radians).
    """

    table: str
    method: str
    data: str
    task: str
    size: int
    background: str
    reference: str
    numbers: dict[str, float]


def _read() -> Iterator[Row]:
    with open(Path(__file__).with_name("paper_figures.csv"), encoding="utf-8", newline="") as file:
        for table, method, data, task, size, background, reference, *numbers in list(csv.reader(file))[1:]:
            known = {name: float(number) for name, number in zip(NAMES, numbers, strict=True) if number}
            yield Row(table, method, data, task, int(size), background, reference, known)


ROWS = list(_read())


def rows_for(task: str, size: int, background: str, reference: str) -> list[Row]:
    """The paper's rows for a setting; Table 1b, which compares references, is shown with both."""
    setting = (task, size, background)
    rows = [row for row in ROWS if (row.task, row.size, row.background) == setting]
    return [row for row in rows if row.reference == reference or row.table == "1b"]


@dataclass
class Measured:
    """One setting: a folder of views at one size, with or without background."""

    folder: str
    task: str
    reference: str
    size: int
    background: str
    native: int = 0  # pixels of the files
    images: int = 0
    identities: int = 0
    mask: str = "none"
    intervals: dict[str, Interval] = field(default_factory=dict)
    baselines: dict[str, dict[str, Interval]] = field(default_factory=dict)  # by row: what gives dlib's figures meaning

    @property
    def title(self) -> str:
        return f"{self.task}, {self.reference} reference, {self.size} px, {self.background} background"


def setting_table(result: Measured) -> str:
    """Our row and the paper's of the same setting, as Markdown under a heading."""
    names = [name for name in PAPER_METRICS if name in result.intervals]
    rows = [["**measured here**", *(_cell(result, name) for name in names)]]
    for title, intervals in result.baselines.items():
        rows.append([title, *(cell(intervals[n], PAPER_METRICS[n].digits) if n in intervals else "" for n in names)])
    for row in rows_for(result.task, result.size, result.background, result.reference):
        numbers = [row.numbers.get(PAPER_METRICS[name].paper, "") for name in names]
        rows.append([f"Table {row.table}, {row.data}: {row.method}", *(str(n) for n in numbers)])
    facts = f"{result.identities} identities, N = {result.images} images; views from `{Path(result.folder).name}`"
    if result.native < result.size:
        facts += f"; enlarged from {result.native} px, which flatters SSIM and PSNR: not comparable with the paper"
    if result.background == "without":
        facts += f"; cut out by masks: {result.mask}"
    titles = [f"{metric.title} {'↑' if metric.more_is_better else '↓'}" for metric in map(PAPER_METRICS.get, names)]
    return f"### {result.title}\n\n{facts}.\n\n" + markdown_table(["", *titles], rows)


def _cell(result: Measured, name: str) -> str:
    interval, digits = result.intervals[name], PAPER_METRICS[name].digits
    if name.removeprefix("mini_") in SET_METRICS:
        return "none" if interval.mean != interval.mean else f"{interval.mean:.{digits}f}"
    return cell(interval, digits)
