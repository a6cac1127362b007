"""Camera poses as EG3D's 25 numbers: labels, angles, trajectories. `.files` reads and writes them.

A label is a float32 vector of 25: the camera-to-world matrix (4x4, row-major) followed by the intrinsics (3x3,
row-major, divided by the image size). Cameras follow OpenCV (x right, y down, z forward); the world has y up, x to the
right of the frontal image and z from the head towards the frontal camera. Source: EG3D (Chan et al., CVPR 2022),
supplement and `camera_utils.py` of its code: focal 4.2647, principal point 0.5, radius 2.7, look-at point (0, 0, 0.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

RADIUS = 2.7
FOCAL = 4.2647
PIVOT = (0.0, 0.0, 0.2)
LABEL_SIZE = 25
TRAJECTORIES = ("arc", "orbit", "figure_eight", "spiral")
Numbers = float | Sequence[float] | Tensor
CENTRES = ("pivot", "eg3d")  # what a path circles: see `orbit_camera`


class CameraAngles(NamedTuple):
    """Degrees, each of the label's leading shape. yaw > 0: seen from world +x; pitch > 0: seen from above."""

    yaw: Tensor
    pitch: Tensor
    roll: Tensor


def orbit_camera(
    yaw: Numbers,
    pitch: Numbers,
    roll: Numbers = 0.0,
    radius: Numbers = RADIUS,
    focal: Numbers = FOCAL,
    pivot: Sequence[float] = PIVOT,
    around: str = "pivot",
) -> Tensor:
    """Camera on a sphere, looking at `pivot`.

    Args:
        yaw, pitch, roll: degrees; numbers give a label [25], lists or tensors of V numbers (broadcast together) give
            [V, 25]. yaw > 0 moves the camera to world +x, pitch > 0 moves it up, roll > 0 turns it clockwise about its
            viewing direction (the image's content turns counter-clockwise).
        radius: of the sphere in world units.
        focal: in image sizes.
        around: one of CENTRES. "pivot" is the sphere's centre, so yaw and pitch are the angles at which the head is
            seen; with "eg3d" it is the world's origin, as in EG3D's `LookAtPoseSampler` with horizontal = 90 + yaw and
            the polar angle 90 - pitch.

    Raises:
        ValueError: |pitch| of 90 degrees or more, or an unknown `around`.
    """
    if around not in CENTRES:
        raise ValueError(f"cameras circle around {' or '.join(CENTRES)}, not {around!r}")
    yaw, pitch, roll, radius, focal = _broadcast(yaw, pitch, roll, radius, focal)
    if (pitch.abs() >= 90).any():
        raise ValueError(f"pitch must lie strictly between -90 and 90 degrees, got {pitch.flatten().tolist()}")
    outwards, target = _direction(yaw, pitch), torch.tensor(pivot, dtype=torch.float64)
    if around == "pivot":
        centre, forward = target + radius[..., None] * outwards, -outwards
    else:
        centre = radius[..., None] * outwards
        forward = torch.nn.functional.normalize(target - centre, dim=-1)
    return join_label(_pose(forward, centre, roll), pinhole(focal)).float()


def focal_from_fov(fov: float | Tensor) -> float | Tensor:
    """Focal length in image sizes from the field of view in degrees."""
    half = torch.deg2rad(torch.as_tensor(fov, dtype=torch.float64)) / 2
    focal = 0.5 / torch.tan(half)
    return focal if isinstance(fov, Tensor) else focal.item()


def fov_from_focal(focal: float) -> float:
    """Field of view in degrees from the focal length in image sizes."""
    return math.degrees(2 * math.atan(0.5 / focal))


def split_label(label: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 25] -> camera-to-world [..., 4, 4] and normalised intrinsics [..., 3, 3]."""
    if label.shape[-1] != LABEL_SIZE:
        raise ValueError(
            f"a label has {LABEL_SIZE} numbers (4x4 pose and 3x3 intrinsics), got shape {tuple(label.shape)}"
        )
    return label[..., :16].unflatten(-1, (4, 4)), label[..., 16:].unflatten(-1, (3, 3))


def join_label(pose: Tensor, intrinsics: Tensor) -> Tensor:
    """Camera-to-world [..., 4, 4] and normalised intrinsics [..., 3, 3] -> label [..., 25]."""
    if pose.shape[-2:] != (4, 4) or intrinsics.shape[-2:] != (3, 3):
        raise ValueError(f"expected [..., 4, 4] and [..., 3, 3], got {tuple(pose.shape)} and {tuple(intrinsics.shape)}")
    return torch.cat([pose.flatten(-2), intrinsics.flatten(-2)], dim=-1)


def pose_matrix(turn: Tensor, shift: Tensor) -> Tensor:
    """Rotation [..., 3, 3] and translation [..., 3] as one matrix [..., 4, 4]."""
    pose = torch.zeros(*turn.shape[:-2], 4, 4, dtype=turn.dtype, device=turn.device)
    pose[..., :3, :3], pose[..., :3, 3], pose[..., 3, 3] = turn, shift, 1
    return pose


def pinhole(focal: float | Tensor) -> Tensor:
    """Normalised intrinsics [..., 3, 3], float64, of a square image from the focal length [...] in image sizes."""
    focal = torch.as_tensor(focal, dtype=torch.float64)
    matrix = torch.zeros(*focal.shape, 3, 3, dtype=focal.dtype)
    matrix[..., 0, 0] = matrix[..., 1, 1] = focal
    matrix[..., :2, 2] = 0.5
    matrix[..., 2, 2] = 1
    return matrix


def viewing_directions(labels: Tensor) -> Tensor:
    """Unit vectors [..., 3] from the scene towards the cameras of labels [..., 25], in world axes."""
    return -split_label(labels)[0][..., :3, 2]


def yaw_pitch(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Unit viewing directions [..., 3] -> yaw (positive towards world +x) and pitch (positive up), degrees."""
    yaw = torch.atan2(directions[..., 0], directions[..., 2])
    return torch.rad2deg(yaw), torch.rad2deg(torch.asin(directions[..., 1].clamp(-1, 1)))


def camera_angles(label: Tensor) -> CameraAngles:
    """Yaw, pitch and roll in degrees from the rotation alone; the inverse of `orbit_camera` for |pitch| < 90."""
    turn = split_label(label)[0][..., :3, :3].double()
    back = -turn[..., :, 2]
    level = _pose(-back, torch.zeros_like(back), torch.zeros_like(back[..., 0]))[..., :3, :3]
    spin = level.transpose(-1, -2) @ turn  # rotation about the camera's own z
    roll = torch.rad2deg(torch.atan2(spin[..., 1, 0], spin[..., 0, 0]))
    return CameraAngles(*(angle.float() for angle in (*yaw_pitch(back), roll)))


def validate_labels(labels: Tensor, source: str = "camera labels", names: list[str] | None = None) -> Tensor:
    """Return the labels as float32 [V, 25], or raise ValueError saying which one is wrong and how. `source`
    names them all, `names` every single one."""
    labels = torch.as_tensor(labels, dtype=torch.float32)
    labels = labels[None] if labels.ndim == 1 else labels
    if labels.ndim != 2 or labels.shape[1] != LABEL_SIZE or len(labels) == 0:
        raise ValueError(f"{source}: expected [V, {LABEL_SIZE}] numbers, got {tuple(labels.shape)}")
    pose, intrinsics = split_label(labels)
    turn, finite = pose[:, :3, :3], torch.isfinite(labels)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0])
    skew = (turn.mT @ turn - torch.eye(3)).abs().amax((1, 2))
    handedness = torch.linalg.det(turn.nan_to_num())
    last_row = (pose[:, 3] - bottom).abs().amax(1)
    focal = intrinsics[:, [0, 1], [0, 1]].amin(1)
    largest = intrinsics[:, :2].abs().amax((1, 2))
    problems = (  # wrong [V], what, the number to show [V]
        (~finite.all(1), "contains NaN or infinity (first in place {:.0f} of 25)", finite.int().argmin(1) + 1),
        (skew > 1e-3, "has a rotation that is not orthonormal (off by {:.3g})", skew),
        (handedness < 0, "has a mirrored rotation (determinant {:.3g}); flip one axis", handedness),
        (last_row > 1e-4, "has a last pose row other than 0 0 0 1 (off by {:.3g})", last_row),
        (focal <= 0, "has a focal length that is not positive ({:.3g})", focal),
        (largest > 50, "has intrinsics in pixels ({:.5g}); divide them by the image size", largest),
    )
    for wrong, what, numbers in problems:
        if wrong.any():
            view = int(wrong.nonzero()[0])
            name = f"view {view}" if names is None else f"view {view} ({names[view]})"
            raise ValueError(f"{source}: {name} {what.format(float(numbers[view]))}")
    return labels


def trajectory(
    kind: str,
    views: int,
    yaw: float | tuple[float, float] = (-45.0, 45.0),
    pitch: float | tuple[float, float] = (-10.0, 10.0),
    around: str = "pivot",
    **camera: Any,
) -> Tensor:
    """A camera path [views, 25] inside the given yaw and pitch ranges (degrees).

    "arc": yaw from first to last value at the middle pitch. "orbit": one closed loop, yaw as sine and pitch
    as cosine, the way EG3D's videos move. "figure_eight": a closed lying eight. "spiral": from the middle
    outwards in two turns.
    around, camera (roll, radius, focal, pivot): as in `orbit_camera`.
    """
    if kind not in TRAJECTORIES:
        raise ValueError(f"unknown trajectory {kind!r}; choose one of {', '.join(TRAJECTORIES)}")
    if views < 1:
        raise ValueError(f"a trajectory needs at least one view, got {views}")
    step = torch.arange(views, dtype=torch.float64)
    if kind == "arc":
        across, up = (2 * step / max(views - 1, 1) - 1 if views > 1 else torch.zeros(1)), torch.zeros(views)
    elif kind == "spiral":
        reach = step / max(views - 1, 1)
        phase = 2 * math.pi * 2 * reach
        across, up = reach * torch.sin(phase), reach * torch.cos(phase)
    else:
        phase = 2 * math.pi * step / views
        across = torch.sin(phase)
        up = torch.cos(phase) if kind == "orbit" else torch.sin(2 * phase)
    return orbit_camera(_span(yaw, across), _span(pitch, up), around=around, **camera)


def _broadcast(*values: Numbers) -> list[Tensor]:
    return torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float64) for value in values))


def _direction(yaw: Tensor, pitch: Tensor) -> Tensor:
    yaw, pitch = torch.deg2rad(yaw), torch.deg2rad(pitch)
    flat = torch.cos(pitch)
    return torch.stack([torch.sin(yaw) * flat, torch.sin(pitch), torch.cos(yaw) * flat], dim=-1)


def _pose(forward: Tensor, centre: Tensor, roll: Tensor) -> Tensor:
    up = torch.tensor([0.0, 1.0, 0.0], dtype=forward.dtype).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    angle = torch.deg2rad(roll)[..., None]
    cosine, sine = torch.cos(angle), torch.sin(angle)
    right, down = right * cosine + down * sine, down * cosine - right * sine
    return pose_matrix(torch.stack([right, down, forward], dim=-1), centre)


def _span(limits: float | tuple[float, float], amount: Tensor) -> Tensor:
    low, high = (limits, limits) if isinstance(limits, (int, float)) else limits
    return (low + high) / 2 + (high - low) / 2 * amount
