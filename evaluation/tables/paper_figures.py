"""What the paper's Tables 1 to 3 report for novel portrait synthesis, typed from the paper (Gu et al., CVPR 2024) into
`paper_figures.csv`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAMES = ("lpips", "ssim", "dists", "id", "fid", "pose")


@dataclass(frozen=True)
class Row:
    """A line of one of the paper's tables, in the setting that it was measured in.

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
    with open(Path(__file__).with_suffix(".csv"), encoding="utf-8", newline="") as file:
        for table, method, data, task, size, background, reference, *numbers in list(csv.reader(file))[1:]:
            known = {name: float(number) for name, number in zip(NAMES, numbers, strict=True) if number}
            yield Row(table, method, data, task, int(size), background, reference, known)


ROWS = list(_read())


def rows_for(task: str, size: int, background: str, reference: str) -> list[Row]:
    """The paper's rows for a setting; Table 1b, which compares references, is shown with both."""
    setting = (task, size, background)
    rows = [row for row in ROWS if (row.task, row.size, row.background) == setting]
    return [row for row in rows if row.reference == reference or row.table == "1b"]
