"""Alignment of calibrated images to EG3D: the head's pose from five points, exact labels, exact crops.

The five points (eye on the left and on the right of the image, nose tip, mouth corner on the left and on the right)
are triangulated in the rig's world, and one similarity carries them to where EG3D's preparation of FFHQ puts them.
Every camera keeps its centre and its roll; it is turned until it looks at EG3D's pivot and given EG3D's focal length,
so the crop is a homography of the image and the label is exact, parallax included. EG3D itself scales its crops by
the face's size and writes radius 2.7 into every label; here the radius is the camera's true distance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffportrait3d.cameras.labels import FOCAL, PIVOT, RADIUS, join_label
from diffportrait3d.images import UserImage

from .reader import PortraitView, SkippedGroup

# The five standard points of the alignment that EG3D uses (Deep3DFaceRecon's `similarity_Lm3D_all.mat`, units of 10
# cm, the standard crop's camera 10 in front of them), moved into EG3D's world as its preparation of FFHQ moves cameras:
# times 0.27, plus (0, 0.006, 0.161), then scaled about the origin until that camera's distance is 2.7.
_STANDARD = torch.tensor(
    [
        [-0.31148657, 0.29036078, 0.13377953],
        [0.30979887, 0.28972036, 0.13179526],
        [0.0032535, -0.04617932, 0.55244243],
        [-0.25216928, -0.38133916, 0.22405732],
        [0.2484662, -0.38128236, 0.22235769],
        [0.0, 0.0, 10.0],  # the camera
    ],
    dtype=torch.float64,
) * 0.27 + torch.tensor([0.0, 0.006, 0.161], dtype=torch.float64)
FIVE_POINTS = _STANDARD[:5] * RADIUS / _STANDARD[5].norm()

LARGEST_RESIDUAL = 0.04  # of five points against FIVE_POINTS, world units (1.5 cm); points in a wrong order have 0.08
LARGEST_TURN = 45.0  # degrees between a camera's axis and the head
LARGEST_SUPERSAMPLING = 16


class Camera(NamedTuple):
    """world_to_camera [4, 4] (OpenCV) and intrinsics [3, 3] divided by the image's size (the first pixel's centre is
    at half a pixel); float64."""

    world_to_camera: Tensor
    intrinsics: Tensor


@dataclass(frozen=True)
class Similarity:
    """x -> scale * rotation @ x + shift: from the rig's world to EG3D's."""

    scale: Tensor
    rotation: Tensor  # [3, 3]
    shift: Tensor  # [3]

    def __call__(self, points: Tensor) -> Tensor:
        return self.scale * points @ self.rotation.T + self.shift


class Crop(NamedTuple):
    """label [25]; homography [3, 3] from places in the crop to places in the image, both divided by their sizes."""

    label: Tensor
    homography: Tensor


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


def head_similarity(points: Tensor) -> Similarity:
    """The similarity that brings five points [5, 3] nearest to `FIVE_POINTS` (Umeyama, 1991).

    Raises:
        SkippedGroup: they do not form a face, for instance because their order is another.
    """
    mean, goal = points.mean(0), FIVE_POINTS.mean(0)
    source, target = points - mean, FIVE_POINTS - goal
    u, values, v = torch.linalg.svd(target.T @ source)
    sign = torch.ones(3, dtype=torch.float64)
    sign[2] = torch.sign(torch.linalg.det(u @ v))
    rotation = u @ torch.diag(sign) @ v
    scale = (values * sign).sum() / source.square().sum()
    similarity = Similarity(scale, rotation, goal - scale * rotation @ mean)
    residual = (similarity(points) - FIVE_POINTS).square().sum(1).mean().sqrt()
    if not residual <= LARGEST_RESIDUAL:
        raise SkippedGroup(
            f"the five points do not form a face (off by {residual:.3f} world units): their order must be eye left, "
            "eye right, nose, mouth left, mouth right, as seen in the image"
        )
    return similarity


def eg3d_crop(camera: Camera, similarity: Similarity) -> Crop:
    """The camera in EG3D's world, turned towards the pivot with EG3D's focal length.

    Raises:
        SkippedGroup: the camera does not look towards the head.
    """
    turn = similarity.rotation @ camera.world_to_camera[:3, :3].T  # camera to world
    centre = similarity(-(camera.world_to_camera[:3, :3].T @ camera.world_to_camera[:3, 3]))
    forward = F.normalize(torch.tensor(PIVOT, dtype=torch.float64) - centre, dim=0)
    cosine = turn[:, 2] @ forward
    if cosine < math.cos(math.radians(LARGEST_TURN)):
        raise SkippedGroup(f"a camera looks {torch.rad2deg(cosine.acos()):.0f} degrees past the head")
    turned = _shortest_rotation(turn[:, 2], forward) @ turn
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3], pose[:3, 3] = turned, centre
    intrinsics = torch.tensor([[FOCAL, 0, 0.5], [0, FOCAL, 0.5], [0, 0, 1]], dtype=torch.float64)
    homography = camera.intrinsics @ turn.T @ turned @ torch.linalg.inv(intrinsics)
    return Crop(join_label(pose, intrinsics).float(), homography)


def aligned_views(
    images: Mapping[str, UserImage], cameras: Mapping[str, Camera], face: Tensor, resolution: int, outside: str
) -> Iterator[tuple[PortraitView, float]]:
    """Crops of images by name, whose cameras are in the same world as the face's five points [5, 3], and the share of
    each crop that its image covers. outside: see `warp`."""
    similarity = head_similarity(face)
    for name, image in images.items():
        crop = eg3d_crop(cameras[name], similarity)
        pixels, inside = warp(image.as_bytes(), crop.homography, resolution, outside)
        yield PortraitView(pixels, crop.label, name, image.notes), inside


def warp(image: np.ndarray, homography: Tensor, resolution: int, outside: str = "border") -> tuple[np.ndarray, float]:
    """The crop uint8 [R, R, 3] of an image uint8 [H, W, 3], and the share of it that the image covers.

    Every output pixel is the mean over its own area, so that shrinking does not alias. outside: what `grid_sample`
    puts where the image ends ("border", "reflection" or "zeros").
    """
    source = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    fine = _supersampling(homography, image.shape[:2], resolution)
    steps = (torch.arange(resolution * fine, dtype=torch.float64) + 0.5) / (resolution * fine)
    bands, covered = [], 0.0
    for rows in steps.split(max(1, 2**20 // (resolution * fine * fine)) * fine):  # whole output rows, limited memory
        y, x = torch.meshgrid(rows, steps, indexing="ij")
        places = _transformed(torch.stack([x, y], dim=-1), homography)  # [rows, R * fine, 2]
        covered += float(((places >= 0) & (places <= 1)).all(-1).double().sum())
        grid = (places * 2 - 1).float()[None]
        values = F.grid_sample(source, grid, padding_mode=outside, align_corners=False)
        bands.append(F.avg_pool2d(values, fine)[0])
    pixels = torch.cat(bands, dim=1).round().clamp(0, 255).byte()
    return pixels.permute(1, 2, 0).contiguous().numpy(), covered / len(steps) ** 2


def _supersampling(homography: Tensor, size: tuple[int, int], resolution: int) -> int:
    """How many source pixels lie along one pixel of the crop's middle, rounded up; at least 2, because single bilinear
    samples of an image of nearly the same scale weigh its pixels unevenly."""
    height, width = size
    middle = torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=torch.float64) / resolution + 0.5
    places = _transformed(middle, homography) * torch.tensor([width, height])
    longest = float((places[1:] - places[0]).norm(dim=1).max())
    return min(max(math.ceil(longest), 2), LARGEST_SUPERSAMPLING)


def _transformed(places: Tensor, homography: Tensor) -> Tensor:
    """Places [..., 2] by a homography [3, 3]."""
    flat = torch.cat([places, torch.ones_like(places[..., :1])], dim=-1) @ homography.T
    return flat[..., :2] / flat[..., 2:]


def _shortest_rotation(start: Tensor, end: Tensor) -> Tensor:
    """The rotation [3, 3] about the common perpendicular that carries unit vector `start` to `end`."""
    x, y, z = torch.linalg.cross(start, end)
    cross = start.new_tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return torch.eye(3, dtype=start.dtype) + cross + cross @ cross / (1 + start @ end)
