"""The crop that the networks know, of a calibrated camera's image or of any photograph: EG3D's camera and its label.

A camera keeps its centre and its roll; it is turned until it looks at EG3D's pivot and given EG3D's focal length, so
the crop is a homography of the image. Of a calibrated camera the label is exact, parallax included. EG3D itself scales
its crops by the face's size and writes radius 2.7 into every label; so does a photograph's camera here, never measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras.labels import FOCAL, PIVOT, join_label, orbit_camera, pinhole, pose_matrix, split_label
from ..cameras.projection import project_to_unit, world_to_camera
from .face import FIVE_NUMBERS, FIVE_POINTS, MEAN_LANDMARKS, five_of
from .landmarks import Landmarks

LARGEST_RESIDUAL = 0.04  # of five points against FIVE_POINTS, world units (1.5 cm); points in a wrong order have 0.08
LARGEST_TURN = 45.0  # degrees between a camera's axis and the head
LARGEST_MISFIT = 0.03  # of a photograph's landmarks against the mean face, in crop sizes; people have 0.01

# The pose fit: how far landmarks of people lie off the mean face (in crop sizes), and how far heads turn (degrees).
MOVED = 0.25  # of jaw, brows and mouth, which an expression moves by twice that spread
# Five points on a nearly flat face hardly tell the pitch; the width of its prior decides where they do not.
LANDMARK_SPREAD, YAW_SPREAD, PITCH_SPREAD = 0.01, 40.0, 15.0
_YAWS, _PITCHES = torch.arange(-75.0, 76.0, 5.0), torch.arange(-45.0, 46.0, 5.0)
_STEPS = (1.0, 0.2)  # degrees, of the finer and finer grids around the best pose so far
_REACH = 5  # steps to each side

EG3D, RENDERED = "EG3D", "rendered heads"
FRAMINGS = (EG3D, RENDERED)


class AlignmentError(ValueError):
    """The points, or the camera, are not those of a face."""


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


SAME_WORLD = Similarity(torch.tensor(1.0), torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


class Crop(NamedTuple):
    """label [25]; homography [3, 3] from places in the crop to places in the image, both divided by their sizes."""

    label: Tensor
    homography: Tensor


def head_similarity(points: Tensor) -> Similarity:
    """The similarity that brings five points [5, 3] nearest to `FIVE_POINTS` (Umeyama, 1991).

    Raises:
        AlignmentError: they do not form a face, for instance because their order is another.
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
        raise AlignmentError(
            f"the five points do not form a face (off by {residual:.3f} world units): their order must be eye left, "
            "eye right, nose, mouth left, mouth right, as seen in the image"
        )
    return similarity


def eg3d_crop(camera: Camera, similarity: Similarity) -> Crop:
    """The camera in EG3D's world, turned towards the pivot with EG3D's focal length.

    Raises:
        AlignmentError: the camera does not look towards the head.
    """
    turn = similarity.rotation @ camera.world_to_camera[:3, :3].T  # camera to world
    centre = similarity(-(camera.world_to_camera[:3, :3].T @ camera.world_to_camera[:3, 3]))
    forward = F.normalize(torch.tensor(PIVOT, dtype=torch.float64) - centre, dim=0)
    cosine = turn[:, 2] @ forward
    if cosine < math.cos(math.radians(LARGEST_TURN)):
        raise AlignmentError(f"a camera looks {torch.rad2deg(cosine.acos()):.0f} degrees past the head")
    turned = _shortest_rotation(turn[:, 2], forward) @ turn
    intrinsics = pinhole(FOCAL)
    homography = camera.intrinsics @ turn.T @ turned @ torch.linalg.inv(intrinsics)
    return Crop(join_label(pose_matrix(turned, centre), intrinsics).float(), homography)


def photograph_crop(landmarks: Landmarks, size: tuple[int, int], framing: str = EG3D, upright: bool = True) -> Crop:
    """The crop of a photograph of which nothing is known but landmarks of the face.

    Its camera is the one that sees the mean face nearest to where the landmarks are: EG3D's, at distance 2.7 with its
    narrow lens, behind a similarity of the image plane. It has the most probable yaw and pitch among all on a grid,
    finer and finer around the best (so that there is no wrong minimum to fall into); roll, scale and shift follow from
    each in closed form.

    Args:
        landmarks: of one face.
        size: (height, width) of the photograph.
        framing: "EG3D" frames the face as EG3D's crops do, for the released weights; "rendered heads" as
            `training.render` does, whose faces are smaller, for the miniature.
        upright: turn the crop until the head is; otherwise the label has the roll.

    Raises:
        AlignmentError: the landmarks do not form a face.
    """
    face, firm = face_points(landmarks, framing).float(), _firmness(landmarks)
    seen = torch.view_as_complex(landmarks.points.double().contiguous())  # [N]
    yaw, pitch = _best_pose(seen, face, firm, _YAWS, _PITCHES)
    for step in _STEPS:
        around = step * torch.arange(-_REACH, _REACH + 1)
        yaw, pitch = _best_pose(seen, face, firm, yaw + around, (pitch + around).clamp(-85, 85))
    label = orbit_camera(yaw, pitch)
    zoom, shift, misfit = (value[0] for value in _similarities(seen, face, firm, label[None]))
    if not misfit <= LARGEST_MISFIT:
        raise AlignmentError(
            f"the landmarks do not form a face (off by {misfit:.1%} of the crop's side); five points are eye left, eye "
            "right, nose, mouth left, mouth right, as seen in the image"
        )
    return eg3d_crop(_seen_through(label, zoom, shift, size, upright), SAME_WORLD)


def face_points(landmarks: Landmarks, framing: str) -> Tensor:
    """Where the mean face has these landmarks, world [N, 3]."""
    if landmarks.numbers is None:
        return FIVE_POINTS if framing == EG3D else five_of(MEAN_LANDMARKS)
    return framed(framing)(MEAN_LANDMARKS)[list(landmarks.numbers)]


def framed(framing: str) -> Similarity:
    """From where rendered heads are to where this framing has them."""
    return head_similarity(five_of(MEAN_LANDMARKS)) if framing == EG3D else SAME_WORLD


def framed_labels(labels: Tensor, framing: str) -> Tensor:
    """The cameras [V, 25] that see rendered heads as `labels` see heads of this framing."""
    similarity = framed(framing)
    pose, intrinsics = split_label(labels)
    moved = pose.double().clone()
    moved[:, :3, :3] = similarity.rotation.T @ moved[:, :3, :3]
    moved[:, :3, 3] = (moved[:, :3, 3] - similarity.shift) @ similarity.rotation / similarity.scale
    return join_label(moved.to(labels), intrinsics)


def _firmness(landmarks: Landmarks) -> Tensor:
    """How much each landmark counts, [N]: those that an expression moves count less."""
    numbers = torch.tensor(landmarks.numbers or FIVE_NUMBERS)
    moved = (numbers < 27) | (numbers > 47)  # jaw, brows, mouth
    return torch.where(moved, MOVED, 1.0).double()


def _best_pose(seen: Tensor, face: Tensor, firm: Tensor, yaws: Tensor, pitches: Tensor) -> tuple[Tensor, Tensor]:
    yaw, pitch = torch.cartesian_prod(yaws, pitches).T  # [P]
    _, _, misfit = _similarities(seen, face, firm, orbit_camera(yaw, pitch))
    cost = firm.sum() * (misfit / LANDMARK_SPREAD) ** 2 + (yaw / YAW_SPREAD) ** 2 + (pitch / PITCH_SPREAD) ** 2
    best = cost.argmin()
    return yaw[best], pitch[best]


def _similarities(seen: Tensor, face: Tensor, firm: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each camera [P, 25] the similarity that brings the face's image nearest to what is seen, complex [N]: turn
    and zoom (a complex number [P]) and shift [P], and how far off they remain: root mean squares [P] in crop sizes."""
    places, _ = project_to_unit(face.expand(len(labels), -1, -1), labels)
    image = torch.view_as_complex(places.double().contiguous())  # [P, N]
    share = firm / firm.sum()
    middle, seen_middle = (image * share).sum(1), (seen * share).sum()
    image, seen = image - middle[:, None], seen - seen_middle
    zoom = (share * image.conj() * seen).sum(1) / (share * image.abs().square()).sum(1)
    off = (share * (seen - zoom[:, None] * image).abs().square()).sum(1).sqrt() / zoom.abs()
    return zoom, seen_middle - zoom * middle, off


def _seen_through(label: Tensor, zoom: Tensor, shift: Tensor, size: tuple[int, int], upright: bool) -> Camera:
    """The camera of `label` [25] behind a similarity of the image plane, from places in the crop to pixels: complex
    turn and zoom, and shift. The turn is the camera's roll, unless the crop is to be upright."""
    middle = shift + zoom * complex(0.5, 0.5)
    yaw_pitch_turn = split_label(label)[0].double()
    if not upright:  # a turn of the image about the crop's middle is one of the camera about its axis
        yaw_pitch_turn[:3, :3] = yaw_pitch_turn[:3, :3] @ _about_axis(-zoom.angle())
        zoom = zoom.abs().to(zoom)
    to_pixels = torch.tensor(
        [[zoom.real, -zoom.imag, 0.0], [zoom.imag, zoom.real, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    corner = middle - zoom * complex(0.5, 0.5)
    to_pixels[:2, 2] = torch.tensor([corner.real, corner.imag])
    height, width = size
    share = torch.diag(torch.tensor([1 / width, 1 / height, 1.0], dtype=torch.float64))
    posed = join_label(yaw_pitch_turn, split_label(label)[1].double())
    return Camera(world_to_camera(posed), share @ to_pixels @ split_label(label)[1].double())


def _about_axis(angle: Tensor) -> Tensor:
    """Rotation [3, 3] by radians about the camera's own z."""
    sine, cosine = torch.sin(angle), torch.cos(angle)
    return torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _shortest_rotation(start: Tensor, end: Tensor) -> Tensor:
    """The rotation [3, 3] about the common perpendicular that carries unit vector `start` to `end`."""
    x, y, z = torch.linalg.cross(start, end)
    cross = start.new_tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return torch.eye(3, dtype=start.dtype) + cross + cross @ cross / (1 + start @ end)
