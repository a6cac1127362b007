"""Aligned views of calibrated cameras: five points (eye on the left and on the right of the image, nose tip, mouth
corner on the left and on the right) are triangulated in the rig's world, and one similarity carries them to where
EG3D's preparation of FFHQ puts them; each camera's crop and label are those of `diffportrait3d.portraits.alignment`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from diffportrait3d.images import UserImage
from diffportrait3d.portraits.alignment import AlignmentError, Camera, eg3d_crop, head_similarity
from diffportrait3d.portraits.warping import warp

from .reader import PortraitView, SkippedGroup


def project_points(points: Tensor, camera: Camera) -> Tensor:
    """World points [N, 3] -> places [N, 2] divided by the image's size."""
    seen = points @ camera.world_to_camera[:3, :3].T + camera.world_to_camera[:3, 3]  # [N, 3]
    flat = seen @ camera.intrinsics.T
    return flat[:, :2] / flat[:, 2:]


def triangulate(places: Tensor, cameras: list[Camera]) -> Tensor:
    """Points [N, 3] nearest to the rays through places [C, N, 2] (divided by the image's size) of C cameras."""
    matrix = places.new_zeros(places.shape[1], 3, 3)
    vector = places.new_zeros(places.shape[1], 3, 1)
    for place, camera in zip(places, cameras, strict=True):
        turn, shift = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
        flat = torch.cat([place, torch.ones_like(place[:, :1])], dim=1)
        rays = F.normalize(flat @ torch.linalg.inv(camera.intrinsics).T @ turn, dim=1)  # [N, 3]
        across = torch.eye(3, dtype=places.dtype) - rays[:, :, None] * rays[:, None, :]  # [N, 3, 3]
        matrix += across
        vector += across @ -(turn.T @ shift)[:, None]
    return torch.linalg.solve(matrix, vector)[..., 0]


def triangulate_face(places: Mapping[str, Tensor], cameras: Mapping[str, Camera], tolerance: float) -> Tensor:
    """The five points [5, 3] from detections [5, 2] by camera name (divided by the image's size).

    The worst camera is dropped until the rest agree to `tolerance` (root mean square, in image sizes).

    Raises:
        SkippedGroup: fewer than two cameras are left.
    """
    names = [name for name in places if name in cameras]
    while len(names) >= 2:
        chosen = [cameras[name] for name in names]
        seen = torch.stack([places[name].double() for name in names])  # [C, 5, 2]
        points = triangulate(seen, chosen)
        errors = torch.stack([project_points(points, camera) for camera in chosen]) - seen
        worst = errors.square().sum(-1).mean(-1).sqrt()  # [C]
        if worst.max() <= tolerance:
            return points
        names.pop(int(worst.argmax()))
    if len([name for name in places if name in cameras]) < 2:
        raise SkippedGroup("fewer than two calibrated cameras have five points")
    raise SkippedGroup(f"no two cameras' five points agree to {tolerance:g} of the image's size")


def aligned_views(
    images: Mapping[str, UserImage], cameras: Mapping[str, Camera], face: Tensor, resolution: int, outside: str
) -> Iterator[tuple[PortraitView, float]]:
    """Crops of images by name, whose cameras are in the same world as the face's five points [5, 3], and the share of
    each crop that its image covers. outside: see `warp`.

    Raises:
        SkippedGroup: the points do not form a face, or a camera does not look towards it.
    """
    try:
        similarity = head_similarity(face)
        crops = {name: eg3d_crop(cameras[name], similarity) for name in images}
    except AlignmentError as error:
        raise SkippedGroup(str(error)) from None
    for name, image in images.items():
        crop = crops[name]
        pixels, inside = warp(image.as_bytes(), crop.homography, resolution, outside)
        yield PortraitView(pixels, crop.label, name, image.notes), inside
