"""Portraits that are not aligned: what happens to a crop whose face was not centred, upright and of standard size."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE, TURN, SHIFT = "scale", "turn", "shift"
MISALIGNMENTS = (SCALE, TURN, SHIFT)
MAX_SCALE, MAX_DEGREES, MAX_SHIFT = 0.10, 10.0, 0.05  # shift in parts of the image's side


def unaligned(images: Tensor, seed: int, parts: Collection[str] = MISALIGNMENTS) -> Tensor:
    """Images [N, 3, H, W], each scaled by up to 10 %, turned by up to 10 degrees and shifted by up to 5 %.

    What comes in at the sides repeats the border. The same seed gives the same images. With some of the `parts` only,
    these are as with all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(len(images), 4, generator=generator) * 2 - 1  # [N, 4]
    draw *= torch.tensor([part in parts for part in (SCALE, TURN, SHIFT, SHIFT)])
    scale, angle = 1 + MAX_SCALE * draw[:, 0], math.radians(MAX_DEGREES) * draw[:, 1]
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale * angle.cos()
    theta[:, 1, 0] = scale * angle.sin()
    theta[:, 0, 1] = -theta[:, 1, 0]
    theta[:, :, 2] = 2 * MAX_SHIFT * draw[:, 2:]
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
