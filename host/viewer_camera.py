"""The camera of the host's 3D viewer (its LOAD3D_CAMERA: a three.js camera, y up, looking along its own -z)."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from ..diffportrait3d.cameras.labels import (
    camera_angles,
    focal_from_fov,
    fov_from_focal,
    join_label,
    orbit_camera,
    pinhole,
    pose_matrix,
    split_label,
    validate_labels,
)

ANGLES, EXACT = "angles only", "as it is"
FRAMINGS = (ANGLES, EXACT)
VIEWER, SPLAT = "3D viewer", "splat"
WORLDS = (VIEWER, SPLAT)
_OPENGL_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))


def viewer_camera(info: dict, framing: str) -> Tensor:
    """Label [25] of a camera_info.

    framing: "angles only" takes direction and roll, with the distance and the lens of EG3D's cameras; "as it is" takes
    position and lens, too, the viewer's world being EG3D's (head at (0, 0, 0.2), 2.7 in front of the camera).

    Raises:
        ValueError: an incomplete or impossible camera, or an orthographic one "as it is".
    """
    if not isinstance(info, dict) or "position" not in info:
        raise ValueError("The 3D viewer gave no camera; open its viewport once, so that it has one.")
    position = _vector(info, "position")
    turn = _rotation(info, position) @ _OPENGL_TO_OPENCV
    label = join_label(pose_matrix(turn, position), pinhole(_focal(info) if framing == EXACT else 1.0))
    label = validate_labels(label.float(), "the 3D viewer's camera")[0]
    if framing == EXACT:
        return label
    yaw, pitch, roll = camera_angles(label)
    return orbit_camera(yaw, pitch.clamp(-89.9, 89.9), roll)


def viewer_info(label: Tensor, world: str) -> dict:
    """The camera_info of a label [25]; the inverse of `viewer_camera` "as it is".

    world: "3D viewer" is EG3D's as it is. "splat" is that of a splat trained on views of Export Views: to Render Splat,
    y and z of splats point the other way than y and z of its cameras.
    """
    pose, intrinsics = (matrix.double() for matrix in split_label(label))
    turn, position = pose[:3, :3] @ _OPENGL_TO_OPENCV, pose[:3, 3]
    if world == SPLAT:
        turn, position = _OPENGL_TO_OPENCV @ turn, _OPENGL_TO_OPENCV @ position
    return {
        "position": _named(position),
        "target": _named(position - turn[:, 2]),
        "quaternion": _named(Rotation.from_matrix(turn.numpy()).as_quat(canonical=True), "xyzw"),
        "fov": fov_from_focal(float(intrinsics[1, 1])),
        "zoom": 1.0,
        "cameraType": "perspective",
    }


def _named(vector: Tensor | np.ndarray, axes: str = "xyz") -> dict[str, float]:
    return dict(zip(axes, vector.tolist(), strict=True))


def _vector(info: dict, name: str, axes: str = "xyz") -> Tensor:
    try:
        return torch.tensor([float(info[name][axis]) for axis in axes], dtype=torch.float64)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"The 3D viewer's camera has no {name} of {', '.join(axes)}, but {info.get(name)!r}; connect the "
            "camera_info of Load 3D or Create Camera Info."
        ) from None


def _rotation(info: dict, position: Tensor) -> Tensor:
    """Camera-to-world rotation [3, 3] with the viewer's axes (x right, y up, z backwards)."""
    if info.get("quaternion"):
        quaternion = _vector(info, "quaternion", "xyzw")
        if quaternion.norm() < 1e-9:
            raise ValueError("The 3D viewer's camera has a quaternion of length 0, which is no rotation.")
        return torch.from_numpy(Rotation.from_quat(quaternion.numpy()).as_matrix())
    back = position - _vector(info, "target")
    if back.norm() < 1e-9:
        raise ValueError("The 3D viewer's camera is at its target; move it away.")
    yaw, pitch = torch.atan2(back[0], back[2]), torch.asin(back[1] / back.norm())
    level = orbit_camera(torch.rad2deg(yaw), torch.rad2deg(pitch).clamp(-89.9, 89.9))
    return level[:16].view(4, 4)[:3, :3].double() @ _OPENGL_TO_OPENCV


def _focal(info: dict) -> float:
    """Focal length in image sizes, from the viewer's vertical field of view."""
    if info.get("cameraType", "perspective") != "perspective":
        raise ValueError(
            f"An {info['cameraType']} camera has no place in space; set it to perspective, or take its {ANGLES}."
        )
    fov = float(info.get("fov") or 0.0)
    if not 0.0 < fov < 180.0 or not math.isfinite(fov):
        raise ValueError(f"The 3D viewer's camera has a field of view of {info.get('fov')} degrees; it must have one.")
    return focal_from_fov(fov) * float(info.get("zoom") or 1.0)
