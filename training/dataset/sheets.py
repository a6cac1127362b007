"""Validation pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffportrait3d.files import write_atomically


def grid(rows: Sequence[Tensor]) -> Tensor:
    """Rows of images [n, 3, H, W] in [-1, 1] as one uint8 picture [rows*H, max n*W, 3]; short rows end in grey."""
    width, (height, side) = max(len(row) for row in rows), rows[0].shape[-2:]
    out = torch.full((len(rows) * height, width * side, 3), 128, dtype=torch.uint8)
    for y, row in enumerate(rows):
        pixels = ((row.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        for x, image in enumerate(pixels):
            out[y * height : (y + 1) * height, x * side : (x + 1) * side] = image.permute(1, 2, 0)
    return out


def save_grid(path: str | Path, rows: Sequence[Tensor]) -> None:
    """Write ``grid(rows)`` as a PNG."""
    picture = Image.fromarray(grid(rows).numpy())
    write_atomically(Path(path), lambda file: picture.save(file, format="PNG"))
