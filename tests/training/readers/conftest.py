"""What the tests of the readers share: images of known points, and the files that go with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from training.sources.conditions import RenderedConditions

SIGMA = 3.0  # of a point's blob, pixels of the source
POINTS = torch.tensor(  # known points of the EG3D world, far apart in every image
    [[-0.17, 0.16, 0.1], [0.17, 0.17, 0.05], [-0.16, -0.17, 0.15], [0.17, -0.16, 0.2]], dtype=torch.float64
)
CONDITIONS = RenderedConditions(people=1)


def rotation(seed: int, degrees: float | None = None) -> torch.Tensor:
    axis = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x, y, z = axis / axis.norm() * np.radians(degrees if degrees is not None else 140.0)
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))


def blobs(places: np.ndarray, size: tuple[int, int], tint=(1.0, 0.87, 0.73)) -> np.ndarray:
    """uint8 [H, W, 3]: soft points on black."""
    x, y = np.arange(size[0]), np.arange(size[1])
    bump = [(np.exp(-((y - py) ** 2) / (2 * SIGMA**2)), np.exp(-((x - px) ** 2) / (2 * SIGMA**2))) for px, py in places]
    value = sum(np.outer(*pair) for pair in bump)
    return (230 * value[..., None] * np.array(tint)).round().astype(np.uint8)


def centre_of_blob(image: np.ndarray, place: np.ndarray, radius: float) -> np.ndarray:
    """Centre of a blob near `place` (x, y; first pixel's centre at 0.5): the fixed point of the mean under a smooth
    window, which no pixel enters or leaves by a jump."""
    y, x = np.mgrid[0 : image.shape[0], 0 : image.shape[1]] + 0.5
    value = image.astype(float).sum(-1)
    for _ in range(20):
        window = np.clip(1 - ((x - place[0]) ** 2 + (y - place[1]) ** 2) / radius**2, 0, None) ** 2
        weight = (value - value.min()) * window
        place = np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()
    return place


def write_five(path: Path, places: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{x:.9f} {y:.9f}\n" for x, y in places))


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path
