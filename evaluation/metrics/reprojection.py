"""View consistency: carry one view into another through the exact depth of the ground truth and compare.

The depth is the renderer's, so the measure asks whether a set of generated views shows ONE surface where the
subject's surface is. A view set that ignores the subject but agrees with itself on another shape scores badly;
the ground truth's own error (resampling, highlights) is the floor to read the numbers against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffportrait3d.cameras.labels import split_label
from diffportrait3d.cameras.projection import camera_rays, pixel_centres, world_to_camera

DEPTH_TOLERANCE = 0.015  # world units; a head is about 0.45 tall and 128 px see 0.64
MIN_SHARED = 0.02  # a pair counts if at least this part of the image is co-visible


def unproject(depth: Tensor, label: Tensor) -> Tensor:
    """Depth [H, W] (camera z) seen by label [25] -> world points [H, W, 3], through pixel centres."""
    rays = camera_rays(pixel_centres(*depth.shape, like=depth), label).unflatten(0, depth.shape)  # [H, W, 3], z = 1
    pose, _ = split_label(label)
    return rays * depth[..., None] @ pose[:3, :3].mT + pose[:3, 3]


def correspondence(depth: Tensor, mask: Tensor, labels: Tensor, source: int, target: int) -> tuple[Tensor, Tensor]:
    """Where each pixel of view `target` is seen in view `source`.

    depth [V, H, W], mask [V, H, W] (bool, foreground), labels [V, 25]. Returns a grid [H, W, 2] in [-1, 1] for
    grid_sample(align_corners=False) and the co-visible pixels [H, W] (bool).
    """
    points = unproject(depth[target], labels[target])  # [H, W, 3]
    inverse, intrinsics = world_to_camera(labels[source]), split_label(labels[source])[1]
    camera = points @ inverse[:3, :3].mT + inverse[:3, 3]
    z = camera[..., 2]
    image = (camera / z.clamp(min=1e-6)[..., None]) @ intrinsics.mT
    grid = 2 * image[..., :2] - 1
    solid = mask[source].to(depth.dtype)
    seen = torch.stack([depth[source] * solid, solid])[None]  # [1, 2, H, W]
    at = F.grid_sample(seen, grid[None], mode="bilinear", align_corners=False)[0]
    nearest = F.grid_sample(seen, grid[None], mode="nearest", align_corners=False)[0, 0]
    # all four neighbours must be foreground and at the point's depth: edges and hidden points drop out
    agrees = ((at[0] - z).abs() < DEPTH_TOLERANCE) & ((nearest - z).abs() < DEPTH_TOLERANCE)
    return grid, mask[target] & (z > 0) & (at[1] > 0.999) & agrees


def reprojection_pairs(depth: Tensor, mask: Tensor, labels: Tensor) -> list[tuple[int, int, Tensor, Tensor]]:
    """All ordered pairs of views that share enough surface: (source, target, grid, co-visible pixels)."""
    pairs = []
    for source in range(len(labels)):
        for target in range(len(labels)):
            if source != target:
                grid, shared = correspondence(depth, mask, labels, source, target)
                if shared.float().mean() >= MIN_SHARED:
                    pairs.append((source, target, grid, shared))
    return pairs


def reprojection_error(images: Tensor, pairs: list[tuple[int, int, Tensor, Tensor]]) -> float:
    """Mean absolute difference between views [V, 3, H, W] and the other views carried into them.

    Each pair counts once, whatever its area. NaN if no pair shares enough surface.
    """
    errors = []
    for source, target, grid, shared in pairs:
        carried = F.grid_sample(images[source][None], grid[None], mode="bilinear", align_corners=False)[0]
        errors.append((carried - images[target]).abs()[:, shared].mean())
    return torch.stack(errors).mean().item() if errors else float("nan")
