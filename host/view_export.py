"""From the host's IMAGE and MASK to a data set for 3D reconstruction."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from ..diffportrait3d.cameras.export import export_views
from ..diffportrait3d.synthetic_heads.points import head_points
from .images import check_images, check_one_camera_each

FEWEST_POINTS = 4  # as many neighbours are looked for when a splat is given its size


def export_batch(folder: Path, images: Tensor, labels: Tensor, masks: Tensor | None, start_points: int) -> None:
    """Writes IMAGE [V, H, W, 3 or 4], cameras [V, 25] and MASK [V, H, W] to a new folder, with about `start_points`
    points on an invented head.

    Raises:
        ValueError: broken or empty images or masks, or counts and sizes that differ.
    """
    check_images(images, "Export Views")
    check_one_camera_each(images, labels, "Export Views")
    if masks is not None:
        check_images(masks, "Export Views", "masks")
        _check_not_black(masks)
    points = head_points(images.cpu(), labels, start_points) if start_points else None
    if points is not None and len(points.positions) < FEWEST_POINTS:
        logging.warning(
            "Export Views: the cameras see %d of the start points, too few for gsplat to start from; ask for more, or, "
            "if they do not look at a head at (0, 0, 0.2), start from random points.",
            len(points.positions),
        )
    export_views(folder, images, labels, masks, points)


def _check_not_black(masks: Tensor) -> None:
    black = (masks.flatten(1).amax(1) <= 0).nonzero().flatten().tolist()
    if black:
        raise ValueError(f"Export Views: the mask of view {black[0]} is empty; white marks what counts, invert it?")
