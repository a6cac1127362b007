"""World points to images, and images' points to rays, by the cameras of labels (see `.labels`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .labels import pose_matrix, split_label


def world_to_camera(label: Tensor) -> Tensor:
    """The inverse pose [..., 4, 4] (world point -> OpenCV camera point), from the rotation's transpose."""
    pose, _ = split_label(label)
    turn = pose[..., :3, :3].transpose(-1, -2)
    return pose_matrix(turn, (-turn @ pose[..., :3, 3:]).squeeze(-1))


def project(points: Tensor, label: Tensor, resolution: int | tuple[int, int]) -> Tensor:
    """World points in pixels.

    Args:
        points: [N, 3].
        label: [25].
        resolution: side of a square image, or (height, width).

    Returns:
        [N, 3]: x, y (the first pixel's centre at 0.5; y down) and camera depth z
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    view = world_to_camera(label).to(points)
    intrinsics = split_label(label)[1].to(points)
    camera = points @ view[:3, :3].T + view[:3, 3]  # [N, 3]
    image = camera @ intrinsics.T
    x, y = image[:, 0] / image[:, 2] * width, image[:, 1] / image[:, 2] * height
    return torch.stack([x, y, camera[:, 2]], dim=1)


def project_to_unit(points: Tensor, label: Tensor, at_infinity: bool = False) -> tuple[Tensor, Tensor]:
    """World points in parts of the image, for networks: in batches, and finite with finite gradients everywhere.

    It rounds otherwise than `project`: data sets that are rendered again and networks that are trained again have to
    be equal to the bit.

    Args:
        points: [N, P, 3]; directions if `at_infinity`, so that the camera's position plays no part.
        label: [N, 25].

    Returns:
        x, y in [0, 1] (y down) [N, P, 2], meaningless behind the camera, and camera depth [N, P]
    """
    pose, intrinsics = split_label(label)
    offsets = points if at_infinity else points - pose[:, None, :3, 3]
    camera = offsets @ pose[:, :3, :3]  # world to camera: rows times R
    depth = camera[..., 2]
    image = (camera / depth.clamp(min=1e-3)[..., None]) @ intrinsics.mT
    return image[..., :2], depth


def pixel_centres(height: int, width: int, like: Tensor) -> Tensor:
    """x, y in [0, 1] of all pixels [height * width, 2], row by row, with the type and device of `like`."""
    v, u = ((torch.arange(n, dtype=like.dtype, device=like.device) + 0.5) / n for n in (height, width))
    return torch.cartesian_prod(v, u).flip(1)


def camera_rays(image: Tensor, label: Tensor) -> Tensor:
    """Rays in the camera's axes, of depth 1, through x, y [P, 2] in [0, 1]: [..., P, 3] for labels [..., 25]."""
    _, intrinsics = split_label(label)
    inverse = torch.linalg.inv_ex(intrinsics).inverse  # `inv` would wait for a GPU to say that it is regular
    return torch.cat([image, torch.ones_like(image[:, :1])], dim=1) @ inverse.mT


def world_rays(image: Tensor, label: Tensor) -> Tensor:
    """The same as unit vectors in world axes."""
    pose, _ = split_label(label)
    return normalize(camera_rays(image, label) @ pose[..., :3, :3].mT, dim=-1)
