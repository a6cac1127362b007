"""Contact sheets of validation images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from diffportrait3d.images import save_image, sheet


def save_sheet(path: str | Path, rows: Sequence[Tensor]) -> None:
    """Write rows of images [n, 3, H, W] in [-1, 1] as one PNG; short rows end in grey."""
    save_image(path, sheet([(row.detach().float().cpu() + 1) / 2 for row in rows]))
