"""Points on an invented head, coloured by views: where a 3D reconstruction may start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras.export import Points
from ..cameras.labels import split_label, validate_labels
from ..cameras.projection import project
from . import portrait_scene


def head_points(images: Tensor, labels: Tensor, count: int) -> Points:
    """About `count` points on an invented head, coloured by the images that look at their side of it: a start
    for a reconstruction, not a measurement. Points that no camera looks at are left out.

    Args:
        images: [V, H, W, C].
        labels: [V, 25].
    """
    scene = portrait_scene(0)
    chosen = torch.randperm(len(scene.vertices), generator=torch.Generator().manual_seed(0))[:count]
    positions, normals = scene.vertices[chosen], scene.normals[chosen]  # [P, 3]
    colours, weights = torch.zeros_like(positions), positions.new_zeros(len(positions), 1)
    height, width = images.shape[1:3]
    for image, label in zip(images, validate_labels(labels), strict=True):
        seen = project(positions, label, (height, width))  # [P, 3]
        place = 2 * seen[:, :2] / seen.new_tensor([width, height]) - 1  # [-1, 1] in the image
        towards = F.normalize(split_label(label)[0][:3, 3] - positions, dim=1)
        inside = (place.abs().amax(1) < 1) & (seen[:, 2] > 0)
        weight = (normals * towards).sum(1).clamp(min=0) * inside
        pixels = image[None, ..., :3].movedim(-1, 1).to(positions)  # [1, 3, H, W]
        colour = F.grid_sample(pixels, place[None, :, None], align_corners=False)[0, ..., 0].T  # [P, 3]
        colours += weight[:, None] * colour
        weights += weight[:, None]
    visible = weights[:, 0] > 0.1
    return Points(positions[visible], (colours / weights.clamp(min=0.1))[visible].clamp(0, 1))
