"""Photographs inside the host: their faces, the crop that the networks know, and the way back."""

from __future__ import annotations

import base64
import io
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..diffportrait3d.cameras.labels import camera_angles
from ..diffportrait3d.cameras.projection import project
from ..diffportrait3d.images import as_pixels
from ..diffportrait3d.portraits.alignment import AlignmentError, Crop, face_points, photograph_crop
from ..diffportrait3d.portraits.detector import INSTALL, SIDES, FaceDetector, model_folder
from ..diffportrait3d.portraits.landmarks import LandmarkError, Landmarks, read_landmarks
from ..diffportrait3d.portraits.warping import corners, paste, sample, transformed
from .images import check_images
from .masks import white_where_read

ALIGN, PASTE = "Align Portrait", "Paste Back"
SHOWN = 1024  # pixels of the photograph that the editor shows
BY_HAND = "drag the five points on the node to eyes, nose tip and mouth corners"
OTHERS = "connect landmarks of another detector (Detect Face Landmarks (MediaPipe), DWPose)"


class Aligned(NamedTuple):
    """portrait: IMAGE [1, R, R, 3]. mask: MASK [1, R, R]. crop: label and place. points: [5, 2], where the five points
    are in the photograph, divided by its size."""

    portrait: Tensor
    mask: Tensor
    crop: Crop
    points: Tensor


class Placement(NamedTuple):
    """Where a portrait comes from. photograph: IMAGE [1, H, W, 3 or 4]. homography: see `Crop`."""

    photograph: Tensor
    homography: Tensor


def align_portrait(
    photograph: Tensor,
    landmarks: Any,
    points: str,
    face: int,
    framing: str,
    upright: bool,
    outside: str,
    resolution: int,
    mask: Tensor | None = None,
) -> Aligned:
    """The crop of one face of a photograph IMAGE [1, H, W, 3 or 4]. See `photograph_crop` and `sample`.

    Args:
        landmarks: of a detector, as `read_landmarks` takes them, or None.
        points: the same as text; empty: none.
        face: which face, counted from 0, the largest first.
        mask: MASK [1, h, w] of the person, of any size; None or black: none.

    Raises:
        ValueError: not one image, no face, or landmarks that do not form one; the message says the ways out.
    """
    check_images(photograph, ALIGN, "image")
    if len(photograph) != 1:
        raise ValueError(f"{ALIGN} takes one photograph, got {len(photograph)} images; choose one of them.")
    if mask is not None:
        check_images(mask, ALIGN, "mask")
    pixels, size = photograph[0, ..., :3].movedim(-1, 0).cpu(), tuple(photograph.shape[1:3])  # [3, H, W]
    try:
        faces = _faces(photograph[0], landmarks, points)
        if face >= len(faces):
            raise AlignmentError(f"face {face} is none of the {len(faces)} found; the largest is face 0")
        crop = photograph_crop(faces[face], size, framing, upright)
    except (AlignmentError, LandmarkError) as error:
        raise ValueError(f"{ALIGN}: {str(error).rstrip('.')}; or {BY_HAND}.") from None
    portrait, covered = sample(pixels, crop.homography, (resolution, resolution), outside)
    shown = covered.float()
    if mask is not None and mask.max() > 0:  # Load Image gives a black mask for a file without transparency
        person, _ = white_where_read(mask.cpu(), photograph, "auto")
        shown = shown * sample(person[:1], crop.homography, (resolution, resolution))[0][0]
    points = _five_points(faces[face], crop, framing, size)
    return Aligned(portrait.movedim(0, -1)[None].clamp(0, 1), shown[None], crop, points)


def paste_back(placement: Placement, view: Tensor, feather: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(IMAGE, MASK): the photograph with a view [1, R, R, 3 or 4] in the portrait's place, and where.

    Args:
        feather: width of the soft edge in parts of the side.
        mask: MASK [1, h, w], which part of the view is laid over the photograph (white).

    Raises:
        ValueError: not one view.
    """
    check_images(view, PASTE, "view")
    if len(view) != 1:
        raise ValueError(f"{PASTE} takes one view, got {len(view)}; choose one by Select Views.")
    opacity = _soft_edge(*view.shape[1:3], feather)
    if mask is not None:
        check_images(mask, PASTE, "mask")
        opacity = opacity * torch.nn.functional.interpolate(mask[:1, None].cpu(), opacity.shape, mode="bilinear")[0, 0]
    photograph = placement.photograph[0].movedim(-1, 0).cpu()
    image, laid = paste(photograph, view[0].movedim(-1, 0).cpu(), opacity, placement.homography)
    return image.movedim(0, -1)[None], laid[None]


def describe(aligned: Aligned) -> dict[str, Any]:
    """What the editor draws on the node, as JSON: places divided by the photograph's size, degrees, a small crop."""
    yaw, pitch, roll = map(float, camera_angles(aligned.crop.label))
    file = io.BytesIO()
    Image.fromarray(as_pixels(aligned.portrait[0].movedim(-1, 0))).resize((256, 256)).save(file, "JPEG")
    return {
        "points": aligned.points.tolist(),
        "corners": corners(aligned.crop.homography).tolist(),
        "angles": [round(yaw, 1), round(pitch, 1), round(roll, 1)],
        "crop": "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(),
    }


def show_photograph(photograph: Tensor) -> dict[str, str]:
    """Saves a photograph [1, H, W, C] for the editor, in the size that it shows; returns the file as the host names
    those of a preview."""
    image = Image.fromarray(as_pixels(photograph[0, ..., :3].movedim(-1, 0)))
    image.thumbnail((SHOWN, SHOWN))
    name = f"photograph_{uuid.uuid4().hex}.jpg"
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, quality=90)
    return {"filename": name, "subfolder": "", "type": "temp"}


def _faces(photograph: Tensor, landmarks: Any, points: str) -> list[Landmarks]:
    """Of a photograph [H, W, 3 or 4]: those given, else those found, else an AlignmentError that says what to do."""
    size = tuple(photograph.shape[:2])
    if landmarks is not None or points.strip():
        faces = read_landmarks(points if landmarks is None else landmarks, size)
        reason = "the landmarks have no face in their first image"
    elif model_folder() is not None:
        faces, reason = find_faces(photograph), f"dlib finds no face: {OTHERS}"
    else:
        faces, reason = [], f"nothing says where the face is: {OTHERS}, install a detector ({INSTALL})"
    if not faces:
        raise AlignmentError(reason)
    return faces


def find_faces(photograph: Tensor) -> list[Landmarks]:
    """By dlib, in [H, W, 3 or 4]; those of the last image are kept, because the editor asks for it again and again."""
    image = as_pixels(photograph[..., :3].movedim(-1, 0))
    key = (image.shape, hash(image.tobytes()))  # not the image: it would stay in memory
    if key not in _last:
        found: list[Landmarks] = []
        for side in SIDES:
            small = Image.fromarray(image)
            small.thumbnail((side, side))
            found = _detector().faces(image, np.asarray(small))
            if found or max(image.shape) <= side:
                break
        _last.clear()
        _last[key] = found
    return _last[key]


_last: dict[tuple, list[Landmarks]] = {}


@lru_cache(maxsize=1)
def _detector() -> FaceDetector:
    return FaceDetector()


def _five_points(face: Landmarks, crop: Crop, framing: str, size: tuple[int, int]) -> Tensor:
    """Five points of a face in the photograph, [5, 2] divided by its size: its own, or those of the mean face there."""
    if face.numbers is None:
        return face.points / torch.tensor(size[::-1])
    places = project(face_points(Landmarks(torch.empty(0), None), framing).float(), crop.label, 1)[:, :2]
    return transformed(places.double(), crop.homography)


def _soft_edge(height: int, width: int, feather: float) -> Tensor:
    """[height, width]: 0 at the edges, 1 from `feather` of the side on."""
    rows, columns = (_ramp(length, feather) for length in (height, width))
    return rows[:, None] * columns


def _ramp(length: int, feather: float) -> Tensor:
    places = (torch.arange(length) + 0.5) / length
    t = (torch.minimum(places, 1 - places) / max(feather, 1e-6)).clamp(0, 1)
    return t * t * (3 - 2 * t)
