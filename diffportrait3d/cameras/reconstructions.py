"""Cameras of data sets for 3D reconstruction: nerfstudio's `transforms.json` and COLMAP's text files.

Both become labels (see `cameras`) in the world in which the poses were made: what nerfstudio says it has applied to
them (`applied_transform`, `applied_scale`) is undone. Lens distortion has no place in a label; `Rows.distortion` says
where there is some.
Sources: nerfstudio documentation, "Data conventions", and its `nerfstudio_dataparser.py`; COLMAP documentation, "Output
Format" and "Camera Models".
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from ..files import read_text

TRANSFORMS = "transforms.json"
COLMAP_FILES = ("cameras.txt", "images.txt")
COLMAP_FOLDERS = ("", "sparse/0", "sparse", "colmap/sparse/0", "colmap/sparse")
PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "OPENCV", "FULL_OPENCV", "SIMPLE_RADIAL", "RADIAL")
NO_PINHOLE = "no pinhole camera; undistort the images first (colmap image_undistorter)"
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
# COLMAP's models that are a pinhole camera but for distortion: how many parameters are focal lengths.
COLMAP_MODELS = {"SIMPLE_PINHOLE": 1, "PINHOLE": 2, "SIMPLE_RADIAL": 1, "RADIAL": 1, "OPENCV": 2, "FULL_OPENCV": 2}
Undo = tuple[float, "np.ndarray | None"]  # scale and inverse transform [4, 4] of what was applied to poses


class Rows(NamedTuple):
    """Labels as a file has them, not checked yet, in its order.

    Attributes:
        names: of the views, where they have names.
        distortion: the first lens distortion that a label leaves out, in words.
    """

    labels: list[Any]
    names: list[str] | None = None
    distortion: str | None = None


def reconstruction_in(folder: Path) -> Path | None:
    """The `transforms.json` of a data set, else the folder of its COLMAP text files, else None."""
    if (folder / TRANSFORMS).is_file():
        return folder / TRANSFORMS
    models = (folder / below for below in COLMAP_FOLDERS)
    return next((model for model in models if all((model / name).is_file() for name in COLMAP_FILES)), None)


def binary_model_in(folder: Path) -> Path | None:
    """The folder of a data set's COLMAP model in binary files, which are not read here."""
    models = (folder / below for below in COLMAP_FOLDERS)
    return next((model for model in models if (model / "images.bin").is_file()), None)


def read_transforms(content: dict[str, Any], folder: Path) -> Rows:
    """The frames of a `transforms.json`, whose parsed content and folder are given.

    A frame's own values (intrinsics, size, distortion) come before the file's. Left out may be: `cx`, `cy` (the
    middle), `fl_y` (`fl_x`), `fl_x` where there is `camera_angle_x`, and `w`, `h` where the image is there to measure.

    Raises:
        ValueError: naming the frame and what is wrong with it.
    """
    frames = content["frames"]
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError("'frames' must be a list of at least one object")
    labels, names, distortions = [], [], []
    undo = _undo_applied(content)
    for number, frame in enumerate(frames):
        name = frame.get("file_path")
        if not isinstance(name, str) or not name:
            raise ValueError(f"frame {number} has no file_path")
        values, where = {**content, **frame}, f"frame {number} ({name})"
        try:
            labels.append(_frame_label(frame, content, folder / name, undo))
            distortions.append(_frame_distortion(values, where))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        names.append(name.replace("\\", "/").removeprefix("./"))
    return Rows(labels, names, next(filter(None, distortions), None))


def read_colmap(folder: Path) -> Rows:
    """The images of `cameras.txt` and `images.txt` in `folder`.

    Raises:
        ValueError: naming the file and line and what is wrong with it.
    """
    cameras = dict(_colmap_camera(line, where) for line, where in _lines(folder / COLMAP_FILES[0]))
    labels, names, distortions = [], [], []
    lines = iter(_lines(folder / COLMAP_FILES[1], empty=True))
    for line, where in lines:
        if not line:
            continue
        words = line.split(maxsplit=9)
        if len(words) != 10:
            raise ValueError(f"{where}: an image has 10 values (id, 4 and 3 of the pose, camera, name), got {line!r}")
        if words[8] not in cameras:
            raise ValueError(f"{where}: image {words[9]!r} has camera {words[8]}, which is not in {COLMAP_FILES[0]}")
        intrinsics, distortion = cameras[words[8]]
        labels.append([*_colmap_pose(_numbers(words[1:8], where), where).flatten().tolist(), *intrinsics])
        names.append(words[9])
        distortions.append(distortion and f"image {words[9]!r} {distortion}")
        _check_points(*next(lines, ("", "")))
    if not labels:
        raise ValueError(f"{folder / COLMAP_FILES[1]}: no images")
    return Rows(labels, names, next(filter(None, distortions), None))


def _frame_label(frame: dict, content: dict, image: Path, undo: Undo) -> list[float]:
    pose = np.array(_nested_numbers(frame.get("transform_matrix"), "transform_matrix"), dtype=np.float64)
    if pose.shape not in ((3, 4), (4, 4)):
        raise ValueError(f"transform_matrix has shape {list(pose.shape)}, not [4, 4]")
    pose = np.concatenate([pose[:3], [[0.0, 0.0, 0.0, 1.0]]]) if len(pose) == 3 else pose
    scale, inverse = undo
    if scale != 1 or inverse is not None:
        pose[:3, 3] /= scale
        pose = pose if inverse is None else inverse @ pose
    pose = pose * [1.0, -1.0, -1.0, 1.0]  # nerfstudio's camera looks along its -z, with y up
    return [*pose.flatten().tolist(), *_frame_intrinsics(frame, content, image)]


def _frame_intrinsics(frame: dict, content: dict, image: Path) -> list[float]:
    sources = (frame, content)
    width, height = (_value(sources, key) for key in ("w", "h"))
    if width is None or height is None:
        width, height = _image_size(image)
    if width <= 0 or height <= 0:
        raise ValueError(f"w {width} and h {height} are no size of an image")
    focals = [_focal(sources, axis, size) for axis, size in (("x", width), ("y", height))]
    focals = [focal for focal in focals if focal is not None]
    if not focals:
        raise ValueError("there is neither fl_x nor camera_angle_x")
    centre_x, centre_y = _value(sources, "cx"), _value(sources, "cy")
    centre_x, centre_y = width / 2 if centre_x is None else centre_x, height / 2 if centre_y is None else centre_y
    return _intrinsics(focals[0], focals[-1], centre_x, centre_y, width, height)


def _intrinsics(fx: float, fy: float, cx: float, cy: float, width: float, height: float) -> list[float]:
    """The last nine numbers of a label, from pixels."""
    return [fx / width, 0.0, cx / width, 0.0, fy / height, cy / height, 0.0, 0.0, 1.0]


def _value(sources: tuple[dict, ...], key: str) -> float | None:
    value = next((source[key] for source in sources if source.get(key) is not None), None)
    return None if value is None else _number(value, key)


def _focal(sources: tuple[dict, ...], axis: str, size: float) -> float | None:
    """Focal length in pixels, by itself or from the angle of view; None where there is neither."""
    for source in sources:
        if source.get(f"fl_{axis}") is not None:
            return _number(source[f"fl_{axis}"], f"fl_{axis}")
        if source.get(f"camera_angle_{axis}") is not None:
            angle = _number(source[f"camera_angle_{axis}"], f"camera_angle_{axis}")
            if not 0 < angle < math.pi:
                raise ValueError(f"camera_angle_{axis} is {angle}, not between 0 and pi")
            return size / 2 / math.tan(angle / 2)
    return None


def _image_size(path: Path) -> tuple[float, float]:
    found = next((each for each in (path, path.with_name(path.name + ".png")) if each.is_file()), None)
    if found is None:
        raise ValueError(f"there are no w and h, and no image {path} to measure")
    try:
        with Image.open(found) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"there are no w and h, and {found} cannot be measured: {error}") from None


def _frame_distortion(values: dict, where: str) -> str | None:
    model = values.get("camera_model", PINHOLES[0])
    if model not in PINHOLES or values.get("is_fisheye"):
        kind = "a fisheye lens" if values.get("is_fisheye") else f"camera_model {model!r}"
        raise ValueError(f"{kind} is {NO_PINHOLE}")
    listed = _nested_numbers(values.get("distortion_params", []), "distortion_params")
    numbers = {key: _number(values[key], key) for key in DISTORTION if values.get(key) is not None}
    numbers |= {f"distortion_params[{place}]": value for place, value in enumerate(listed)}
    return next((f"{where} has {key} = {value:g}" for key, value in numbers.items() if value), None)


def _undo_applied(content: dict) -> Undo:
    """(scale, inverse [4, 4] or None) of what was applied to poses: first the transform, then, on places, the scale."""
    scale = _value((content,), "applied_scale")
    if scale is not None and (scale <= 0 or not math.isfinite(scale)):
        raise ValueError(f"applied_scale is {scale}, not a positive number")
    applied = content.get("applied_transform")
    if applied is None:
        return scale or 1.0, None
    matrix = np.array(_nested_numbers(applied, "applied_transform"), dtype=np.float64)
    if matrix.shape not in ((3, 4), (4, 4)):
        raise ValueError(f"applied_transform has shape {list(matrix.shape)}, not [3, 4]")
    try:
        return scale or 1.0, np.linalg.inv(np.concatenate([matrix[:3], [[0.0, 0.0, 0.0, 1.0]]]))
    except np.linalg.LinAlgError:
        raise ValueError("applied_transform cannot be undone: it has no inverse") from None


def _lines(path: Path, empty: bool = False) -> list[tuple[str, str]]:
    """(text, "file, line N") of the lines that are no comments; of the empty ones, too, if asked."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    stripped = [(line.strip(), f"{path.name}, line {number}") for number, line in lines]
    return [(line, where) for line, where in stripped if line[:1] != "#" and (line or empty)]


def _colmap_camera(line: str, where: str) -> tuple[str, tuple[list[float], str | None]]:
    """Camera id -> (the last nine numbers of its labels, its distortion in words)."""
    words = line.split()
    if len(words) < 5:
        raise ValueError(f"{where}: a camera has an id, a model, a size and parameters, got {line!r}")
    number, model, *values = words
    if model not in COLMAP_MODELS:
        raise ValueError(f"{where}: a {model} camera is {NO_PINHOLE}")
    width, height, *parameters = _numbers(values, where)
    focals = COLMAP_MODELS[model]
    if len(parameters) < focals + 2 or width <= 0 or height <= 0:
        raise ValueError(f"{where}: {model} has no size and parameters {' '.join(values)}")
    centre_x, centre_y, *rest = parameters[focals:]
    distortion = next((f"has a {model} camera with distortion {value:g}" for value in rest if value), None)
    return number, (_intrinsics(parameters[0], parameters[focals - 1], centre_x, centre_y, width, height), distortion)


def _colmap_pose(numbers: list[float], where: str) -> np.ndarray:
    """Camera-to-world [4, 4] from the quaternion (w, x, y, z) and translation of world-to-camera."""
    w, x, y, z, *translation = numbers
    if not 0 < math.hypot(w, x, y, z) < math.inf:
        raise ValueError(f"{where}: the quaternion {numbers[:4]} is no rotation")
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_quat([x, y, z, w]).as_matrix().T
    pose[:3, 3] = -pose[:3, :3] @ translation
    return pose


def _check_points(line: str, where: str) -> None:
    """After every image comes a line with its points, which may be empty; not the next image."""
    words = line.split()
    if len(words) % 3 or (words and not words[-1].lstrip("-").isdigit()):
        raise ValueError(
            f"{where}: expected the points of the image before (X Y ID each) or nothing; got {line[:60]!r}. COLMAP "
            "writes two lines per image."
        )


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is {value!r}, not a number")
    return float(value)


def _numbers(words: list[str], where: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _nested_numbers(value: Any, what: str) -> list:
    """`value` if it is a list, or a list of lists of the same length, of numbers."""
    rows = value if isinstance(value, list) and all(isinstance(row, list) for row in value) else [value]
    if not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        raise ValueError(f"{what} is {json.dumps(value)[:60]}, not a matrix of numbers")
    for number in (each for row in rows for each in row):
        _number(number, f"a value of {what}")
    return value
