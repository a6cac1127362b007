"""Images by homographies: the crop out of a photograph, and a view back into it."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

OUTSIDE = ("border", "reflection", "zeros")  # what a crop shows where its image has ended
LARGEST_SUPERSAMPLING = 16
_BAND = 2**20  # samples at a time


def warp(image: np.ndarray, homography: Tensor, resolution: int, outside: str = "border") -> tuple[np.ndarray, float]:
    """The crop uint8 [R, R, 3] of an image uint8 [H, W, 3], and the share of it that the image covers. See `sample`."""
    source = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    values, covered = sample(source, homography, (resolution, resolution), outside)
    pixels = values.round().clamp(0, 255).byte()
    return pixels.permute(1, 2, 0).contiguous().numpy(), float(covered.mean())


def sample(source: Tensor, homography: Tensor, size: tuple[int, int], outside: str = "border") -> tuple[Tensor, Tensor]:
    """An image by a homography.

    Every output pixel is the mean over its own area, so that shrinking does not alias.

    Args:
        source: float32 [C, H, W].
        homography: float64 [3, 3], from places in the output to places in the source, both divided by their sizes.
        size: (rows R, columns S) of the output.
        outside: one of OUTSIDE, what `grid_sample` puts where the source ends.

    Returns:
        float32 [C, R, S], and float64 [R, S]: the share of every pixel that the source covers.
    """
    fine = _supersampling(homography, (source.shape[1], source.shape[2]), size)
    rows, columns = ((torch.arange(n * fine, dtype=torch.float64) + 0.5) / (n * fine) for n in size)
    bands, covered = [], []
    for band in rows.split(max(1, _BAND // (len(columns) * fine)) * fine):  # whole output rows, limited memory
        y, x = torch.meshgrid(band, columns, indexing="ij")
        places = transformed(torch.stack([x, y], dim=-1), homography)  # [band, S * fine, 2]
        inside = ((places >= 0) & (places <= 1)).all(-1).double()
        values = F.grid_sample(source[None], (places * 2 - 1).float()[None], padding_mode=outside, align_corners=False)
        bands.append(F.avg_pool2d(values, fine)[0])
        covered.append(F.avg_pool2d(inside[None], fine)[0])
    return torch.cat(bands, dim=1), torch.cat(covered)


def transformed(places: Tensor, homography: Tensor) -> Tensor:
    """Places [..., 2] by a homography [3, 3]."""
    flat = torch.cat([places, torch.ones_like(places[..., :1])], dim=-1) @ homography.T
    return flat[..., :2] / flat[..., 2:]


def corners(homography: Tensor) -> Tensor:
    """Where the output's corners are in the source, [4, 2] divided by its size: clockwise from the upper left."""
    return transformed(torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=torch.float64), homography)


def paste(photograph: Tensor, view: Tensor, opacity: Tensor, homography: Tensor) -> tuple[Tensor, Tensor]:
    """A view laid over the place in a photograph that its crop came from.

    Args:
        photograph: float32 [C, H, W]; of four channels the last, alpha, stays.
        view: [3, R, S], any size.
        opacity: [R, S] in [0, 1], of the view.
        homography: of the crop, see `sample`.

    Returns:
        [C, H, W], and what was laid over it, [H, W].
    """
    height, width = photograph.shape[1:]
    scale = torch.tensor([width, height], dtype=torch.float64)
    places = corners(homography) * scale
    left, top = places.amin(0).floor().clamp(min=0).int().tolist()
    right, bottom = torch.minimum(places.amax(0).ceil(), scale).int().tolist()
    result, mask = photograph.clone(), photograph.new_zeros(height, width)
    if left >= right or top >= bottom:
        return result, mask
    part = torch.tensor([[right - left, 0, left], [0, bottom - top, top], [0, 0, 1]], dtype=torch.float64)
    part[:2] /= scale[:, None]
    layer = torch.cat([view[:3], opacity[None]]).float()  # [4, R, S]
    values, covered = sample(layer, torch.linalg.inv(homography) @ part, (bottom - top, right - left))
    over = values[3] * covered.float()  # [rows, columns]
    below = result[:3, top:bottom, left:right]
    below.copy_(torch.lerp(below, values[:3], over))
    mask[top:bottom, left:right] = over
    return result, mask


def _supersampling(homography: Tensor, source: tuple[int, int], size: tuple[int, int]) -> int:
    """How many source pixels lie along one pixel of the output's middle, rounded up; at least 2, because single
    bilinear samples of an image of nearly the same scale weigh its pixels unevenly."""
    (height, width), (rows, columns) = source, size
    middle = torch.tensor([[0, 0], [1 / columns, 0], [0, 1 / rows]], dtype=torch.float64) + 0.5
    places = transformed(middle, homography) * torch.tensor([width, height])
    longest = float((places[1:] - places[0]).norm(dim=1).max())
    return min(max(math.ceil(longest), 2), LARGEST_SUPERSAMPLING)
