"""Landmarks of faces in one image, whichever detector found them, as plain data.

- numbers, as text, lists or arrays: five points (eye on the left of the image, eye on its right, nose tip, mouth
  corner on the left, on the right) or the 68 of iBUG; pixels, or parts of the image where all are between 0 and 1
- OpenPose's frames (`POSE_KEYPOINT` of DWPose and others): {"people": [{"face_keypoints_2d": [x, y, sure, ...]}]}
- MediaPipe's mesh (`FACE_LANDMARKS` of ComfyUI): {"frames": [[{"landmarks_xy": [478, 2]}]], "image_size": (H, W)}

Pixels are places between 0 and the image's sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FIVE, ALL = 5, 68
FEWEST = 5  # of the 68 that must have been seen
LEAST_SURE = 0.1  # of a keypoint of OpenPose that counts
# Points of MediaPipe's mesh that lie where the 68 have one: outline of eyes and lips, inner brows, nose, chin.
MEDIAPIPE = {
    8: 152, 20: 66, 21: 107, 22: 336, 23: 296, 27: 168, 30: 4, 33: 2,
    36: 33, 37: 160, 38: 158, 39: 133, 40: 153, 41: 144, 42: 362, 43: 385, 44: 387, 45: 263, 46: 373, 47: 380,
    48: 61, 51: 0, 54: 291, 57: 17, 60: 78, 64: 308,
}  # fmt: skip
WANTED = "five points (eyes, nose tip, mouth corners, from left to right in the image) or the 68 of iBUG"


class Landmarks(NamedTuple):
    """points: [N, 2] pixels. numbers: which of the 68 they are; None: the five points."""

    points: Tensor
    numbers: tuple[int, ...] | None

    @property
    def extent(self) -> float:
        """The longer side of the box around the points, to tell larger faces from smaller ones."""
        return float((self.points.amax(0) - self.points.amin(0)).amax())


class LandmarkError(ValueError):
    """Something that cannot be read as landmarks; the message says what would be."""


def read_landmarks(value: Any, size: tuple[int, int]) -> list[Landmarks]:
    """The faces of the first image, the largest first.

    Args:
        value: one of the forms above.
        size: (height, width) of the image that is meant; landmarks of the same image in another size are scaled.

    Raises:
        LandmarkError: another form.
    """
    if isinstance(value, str):
        faces = [_of_points(_typed(value), size)]
    elif isinstance(value, Mapping) and "frames" in value:
        faces = _mediapipe(value, size)
    elif isinstance(value, Mapping) and "people" in value:
        faces = _openpose(value, size)
    elif isinstance(value, Sequence) and len(value) and isinstance(value[0], Mapping):
        return read_landmarks(value[0], size)
    else:
        faces = [_of_points(points, size) for points in _stacked(value)]
    return sorted(faces, key=lambda face: face.extent, reverse=True)


def _typed(text: str) -> np.ndarray:
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d*)?(?:[eE]-?\d+)?", text)]
    if len(numbers) not in (2 * FIVE, 2 * ALL):
        raise LandmarkError(f"{len(numbers)} numbers are no points: write x and y of {WANTED}.")
    return np.reshape(numbers, (-1, 2))


def _stacked(value: Any) -> np.ndarray:
    """[faces, N, 2] of nested lists or arrays."""
    try:
        points = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.ndim not in (2, 3) or points.shape[-1] < 2:
        raise LandmarkError(f"{type(value).__name__} is no form of landmarks that is known; give {WANTED}.")
    return points.reshape(-1, *points.shape[-2:])[..., :2]


def _of_points(points: np.ndarray, size: tuple[int, int]) -> Landmarks:
    if len(points) not in (FIVE, ALL) or not np.isfinite(points).all():
        raise LandmarkError(f"{len(points)} points are not known; give {WANTED}, finite numbers.")
    scale = np.array(size[::-1]) if points.min() >= 0 and points.max() <= 1 else 1
    return Landmarks(torch.from_numpy(points * scale), None if len(points) == FIVE else tuple(range(ALL)))


def _mediapipe(value: Mapping, size: tuple[int, int]) -> list[Landmarks]:
    height, width = value.get("image_size", size)
    scale, numbers = np.array([size[1] / width, size[0] / height]), list(MEDIAPIPE.values())
    faces = value["frames"][0] if len(value["frames"]) else []
    try:
        meshes = [np.asarray(face["landmarks_xy"], dtype=np.float64)[numbers] for face in faces]
    except (IndexError, KeyError, TypeError) as error:
        raise LandmarkError(f"A face has no mesh of MediaPipe ({type(error).__name__}: {error}).") from None
    return [Landmarks(torch.from_numpy(mesh * scale), tuple(MEDIAPIPE)) for mesh in meshes]


def _openpose(frame: Mapping, size: tuple[int, int]) -> list[Landmarks]:
    height, width = frame.get("canvas_height") or size[0], frame.get("canvas_width") or size[1]
    faces = []
    for person in frame["people"]:
        flat = np.asarray(person.get("face_keypoints_2d") or [], dtype=np.float64)
        if len(flat) < 3 * ALL:
            continue
        points, sure = flat[: 3 * ALL].reshape(ALL, 3)[:, :2], flat[2 : 3 * ALL : 3]
        seen = np.flatnonzero((sure >= LEAST_SURE) & (points > 0).all(1))
        if len(seen) < FEWEST:
            continue
        scale = np.array([size[1] / width, size[0] / height]) if points.max() > 1 else np.array(size[::-1])
        faces.append(Landmarks(torch.from_numpy(points[seen] * scale), tuple(seen.tolist())))
    return faces
