"""How tables show a metric."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """A column of a table.

    Attributes:
        title: of the column.
        digits: after the decimal point.
        more_is_better: as for PSNR; of errors less is better.
        paper: the column of the paper's tables that it is compared with, "" for none.
    """

    title: str
    digits: int
    more_is_better: bool = False
    paper: str = ""
