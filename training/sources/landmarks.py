"""Five facial points from files, whichever detector wrote them.

Below one folder, for every image `NAME.png` of the source (or of `--extract`) a text file `NAME.txt` with five lines
"x y"; or, for a whole sequence, one JSON file beside where the sequence's folder would be:

    {"frames": {"12": {"222200037": [[x, y], ... five], ...}, ...}}      pixels, by camera
    {"world": {"12": [[x, y, z], ... five], ...}}                        points in the cameras' own world

Order: eye on the left of the image, eye on its right, nose tip, mouth corner on the left, on the right. Pixels are
those of the source's image, 0 at the first pixel's centre.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dataset.images import DataError
from .reader import SkippedGroup, read_json


def read_points(path: Path) -> Tensor:
    """[5, 2] pixels from a text file."""
    try:
        values = np.loadtxt(path, delimiter=None, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"Five points '{path}' cannot be read: {error}.") from None
    return _checked(values, 2, str(path))


@lru_cache(maxsize=8)
def _sequence(path: Path) -> dict[str, Any]:
    content = read_json(path, "five points of a sequence")
    if not isinstance(content, dict) or not ({"frames", "world"} & set(content)):
        raise DataError(f"'{path}' must have 'frames' (points by camera) or 'world' (points in space).")
    return content


def sequence_points(path: Path, frame: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """Of a sequence's file: points [5, 2] by camera, and points [5, 3] in the world if the file has them."""
    content, what = _sequence(path), f"{path}, frame {frame}"
    world = _frame(content.get("world", {}), frame)
    if world is not None:
        return {}, _checked(world, 3, what)
    by_camera = _frame(content.get("frames", {}), frame)
    if by_camera is None:
        raise SkippedGroup(f"'{path}' has no frame {frame}")
    return {str(name): _checked(points, 2, f"{what}, camera {name}") for name, points in by_camera.items()}, None


def _frame(frames: dict[str, Any], frame: int) -> Any:
    return next((frames[key] for key in (str(frame), f"{frame:05d}") if key in frames), None)


def _checked(values: Any, columns: int, what: str) -> Tensor:
    try:
        points = torch.as_tensor(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError):
        points = torch.empty(0)
    if points.shape != (5, columns) or not torch.isfinite(points).all():
        raise DataError(f"{what}: expected five points of {columns} finite numbers, got shape {tuple(points.shape)}.")
    return points
