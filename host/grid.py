"""A contact sheet of views."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..diffportrait3d.cameras.labels import camera_angles
from .images import check_images, check_one_camera_each

CAPTION_HEIGHT = 18


def view_grid(images: Tensor, columns: int = 0, gap: int = 4, labels: Tensor | None = None) -> Tensor:
    """IMAGE [V, H, W, 3] -> IMAGE [1, H', W', 3], row by row on white.

    Args:
        columns: views per row; 0 chooses about as many as rows.
        gap: pixels between views.
        labels: cameras [V, 25]; their yaw and pitch are written below the views, in whole degrees.

    Raises:
        ValueError: no or broken images, or another number of cameras than of images.
    """
    check_images(images, "View Grid")
    tiles = images[..., :3]
    if labels is not None:
        check_one_camera_each(images, labels, "View Grid")
        yaws, pitches, _ = camera_angles(labels)
        angles = zip(yaws.tolist(), pitches.tolist(), strict=True)
        captions = [_caption(f"{yaw:+.0f}\u00b0 {pitch:+.0f}\u00b0", images.shape[2]) for yaw, pitch in angles]
        tiles = torch.cat([tiles, torch.stack(captions)], dim=1)
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    empty = -len(tiles) % columns  # at the end of the last row
    tiles = F.pad(tiles, (0, 0, 0, gap, 0, gap, 0, empty), value=1.0)  # white to the right and below each
    page = rearrange(tiles, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)
    return page[None, : len(page) - gap, : page.shape[1] - gap].contiguous()


def _caption(text: str, width: int) -> Tensor:
    """Black on white [CAPTION_HEIGHT, width, 3]."""
    image = Image.new("RGB", (width, CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.text((width / 2, CAPTION_HEIGHT / 2), text, "black", ImageFont.load_default(12), anchor="mm")
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
