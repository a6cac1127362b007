"""Views with their cameras as a data set for 3D reconstruction: nerfstudio's `transforms.json` and COLMAP's text
files, as text and in binary, beside one folder of images. `.reconstructions` reads both again.

Pixels are counted the same way everywhere (the first pixel's centre at 0.5), COLMAP's camera is ours (OpenCV: y down,
z forward), nerfstudio's is OpenGL's (y up, z backwards). The world is not changed: y up, the head around (0, 0, 0.2).
Sources: COLMAP documentation, "Output Format"; nerfstudio documentation, "Data conventions".
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import Tensor

from ..files import write_folder
from .labels import split_label, validate_labels
from .projection import world_to_camera

IMAGES, MASKS, SPARSE, POINT_CLOUD = "images", "masks", "sparse/0", "points.ply"
PINHOLE = 1  # the number of COLMAP's camera model


class Points(NamedTuple):
    """positions [P, 3] in the world, colours [P, 3] in [0, 1]."""

    positions: Tensor
    colours: Tensor


class Intrinsics(NamedTuple):
    """A pinhole camera in pixels."""

    w: int
    h: int
    fl_x: float
    fl_y: float
    cx: float
    cy: float


def export_views(
    folder: Path, images: Tensor, labels: Tensor, masks: Tensor | None = None, points: Points | None = None
) -> None:
    """Write the data set to `folder`, which must not exist yet and appears only when it is complete.

    Args:
        images: [V, H, W, 3] or, with alpha, [V, H, W, 4] in [0, 1].
        labels: [V, 25].
        masks: [V, H, W] in [0, 1], 1 where the images count.
        points: where a reconstruction may start; without them `points3D.txt` is empty.

    Raises:
        ValueError: counts or sizes differ, or a camera that is no pinhole camera.
        FileExistsError: `folder` is there already.
    """
    labels = validate_labels(labels, "the exported cameras")
    _check_shapes(images, labels, masks)
    intrinsics = [_pixels(label, view, *images.shape[1:3]) for view, label in enumerate(labels)]
    digits = max(3, len(str(len(images) - 1)))
    names = [f"view_{view:0{digits}d}.png" for view in range(len(images))]
    points = Points(torch.zeros(0, 3), torch.zeros(0, 3)) if points is None else points
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; choose another name.")
    files = {
        "transforms.json": _transforms(labels, intrinsics, names, masks is not None),
        POINT_CLOUD: _ply(points),
        **_colmap(labels, intrinsics, names, points),
    }

    def fill(target: Path) -> None:
        for part in (IMAGES, SPARSE, *([] if masks is None else [MASKS])):
            (target / part).mkdir(parents=True)
        for view, name in enumerate(names):
            _save_image(target / IMAGES / name, images[view])
            if masks is not None:
                _save_image(target / _mask_path(name), masks[view])
        for name, content in files.items():
            (target / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    write_folder(folder, fill)


def _check_shapes(images: Tensor, labels: Tensor, masks: Tensor | None) -> None:
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} cameras; give one camera per image.")
    if masks is not None and masks.shape != images.shape[:3]:
        raise ValueError(
            f"masks of shape {tuple(masks.shape)} for images of shape {tuple(images.shape)}; give one mask per image, "
            "of its size."
        )


def _pixels(label: Tensor, view: int, height: int, width: int) -> Intrinsics:
    matrix = split_label(label)[1].double()
    pinhole = torch.diag(matrix.diagonal()).index_put((torch.tensor([0, 1]), torch.tensor([2, 2])), matrix[:2, 2])
    pinhole[2, 2] = 1
    if not torch.allclose(matrix, pinhole, atol=1e-6):
        raise ValueError(f"camera {view} has intrinsics with skew, which a pinhole camera cannot have.")
    fx, fy, cx, cy = (matrix[row, column].item() for row, column in ((0, 0), (1, 1), (0, 2), (1, 2)))
    return Intrinsics(width, height, fx * width, fy * height, cx * width, cy * height)


def _mask_path(name: str) -> str:
    return f"{MASKS}/{name}.png"  # COLMAP looks for the image's name and .png


def _save_image(path: Path, pixels: Tensor) -> None:
    Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().cpu().numpy()).save(path, compress_level=4)


def _transforms(labels: Tensor, intrinsics: list[Intrinsics], names: list[str], masked: bool) -> str:
    poses = split_label(labels)[0].double() * torch.tensor([1.0, -1.0, -1.0, 1.0])  # the camera's y and z turned round
    shared = len(set(intrinsics)) == 1
    content = {"camera_model": "PINHOLE", **(intrinsics[0]._asdict() if shared else {}), "ply_file_path": POINT_CLOUD}
    content["frames"] = [
        {
            "file_path": f"{IMAGES}/{name}",
            **({"mask_path": _mask_path(name)} if masked else {}),
            **({} if shared else lens._asdict()),
            "transform_matrix": pose.tolist(),
        }
        for name, lens, pose in zip(names, intrinsics, poses, strict=True)
    ]
    return json.dumps(content, indent=1)


def _colmap(labels: Tensor, intrinsics: list[Intrinsics], names: list[str], points: Points) -> dict[str, str | bytes]:
    """{path: content} of COLMAP's cameras, images and points3D: as text, and in binary for readers that cannot read
    text, such as the fork of pycolmap that gsplat used until 1.5."""
    lenses = list(dict.fromkeys(intrinsics))  # one camera for all views that share it
    views = world_to_camera(labels.double())  # [V, 4, 4]
    turns = Rotation.from_matrix(views[:, :3, :3].numpy()).as_quat(canonical=True)  # [V, 4], x first
    poses = np.concatenate([np.roll(turns, 1, axis=1), views[:, :3, 3]], axis=1).tolist()  # [V, 7], w first
    lens_ids = [lenses.index(lens) + 1 for lens in intrinsics]
    images = list(zip(poses, lens_ids, names, strict=True))
    cloud = list(zip(points.positions.tolist(), _bytes(points), strict=True))
    return {**_colmap_text(lenses, images, cloud), **_colmap_binary(lenses, images, cloud)}


def _colmap_text(lenses: list[Intrinsics], images: list[tuple], cloud: list[tuple]) -> dict[str, str]:
    cameras = [f"{number} PINHOLE {_line(*lens)}" for number, lens in enumerate(lenses, start=1)]
    views = [  # and after each a line for its points: none
        f"{number} {_line(*pose)} {lens} {name}\n" for number, (pose, lens, name) in enumerate(images, start=1)
    ]
    points = [f"{number} {_line(*place, *colour)} -1" for number, (place, colour) in enumerate(cloud, start=1)]
    return {
        f"{SPARSE}/cameras.txt": _text("CAMERA_ID, MODEL, WIDTH, HEIGHT, FX, FY, CX, CY", cameras),
        f"{SPARSE}/images.txt": _text("IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME; POINTS2D", views),
        f"{SPARSE}/points3D.txt": _text(
            "POINT3D_ID, X, Y, Z, R, G, B, ERROR; on an invented head, not triangulated", points
        ),
    }


def _colmap_binary(lenses: list[Intrinsics], images: list[tuple], cloud: list[tuple]) -> dict[str, bytes]:
    """The same, little-endian: a count, then the entries."""
    cameras = [struct.pack("<IiQQ4d", number, PINHOLE, *lens) for number, lens in enumerate(lenses, start=1)]
    views = [
        struct.pack("<I7dI", number, *pose, lens) + name.encode() + b"\0" + struct.pack("<Q", 0)
        for number, (pose, lens, name) in enumerate(images, start=1)
    ]
    points = [
        struct.pack("<Q3d3BdQ", number, *place, *colour, -1.0, 0)
        for number, (place, colour) in enumerate(cloud, start=1)
    ]
    parts = {"cameras": cameras, "images": views, "points3D": points}
    return {f"{SPARSE}/{name}.bin": struct.pack("<Q", len(part)) + b"".join(part) for name, part in parts.items()}


def _ply(points: Points) -> str:
    axes = [f"property double {axis}" for axis in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
    header = ["ply", "format ascii 1.0", f"element vertex {len(points.positions)}", *axes, "end_header"]
    rows = zip(points.positions.tolist(), _bytes(points), strict=True)
    return "\n".join(header + [_line(*position, *colour) for position, colour in rows]) + "\n"


def _bytes(points: Points) -> list[list[int]]:
    return np.rint(points.colours.numpy() * 255).astype(int).tolist()


def _line(*numbers: float) -> str:
    return " ".join(map(repr, numbers))


def _text(columns: str, lines: list[str]) -> str:
    return "\n".join([f"# {columns}", *lines]) + "\n"
