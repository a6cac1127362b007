"""Data sets for 3D reconstruction (nerfstudio's `transforms.json`, COLMAP's text files, as Export Views writes both) in
place of an export's `dataset.json`: the source's folder is one, or has some as its subfolders, one person each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from diffportrait3d.cameras.files import read_rows
from diffportrait3d.cameras.reconstructions import binary_model_in, reconstruction_in
from diffportrait3d.files import natural_key

IMAGE_FOLDER = "images"  # where the names of COLMAP begin
SUFFIXES = ("", ".png", ".jpg", ".jpeg")  # the Blender scenes name their images without


class PosedViews(NamedTuple):
    """labels: image, relative to the source -> its label, not checked yet. people: image -> whom it shows.
    left_out: data set -> why."""

    labels: dict[str, Any]
    people: dict[str, str]
    left_out: dict[str, str]


def has_posed_views(root: Path) -> bool:
    """Whether `root` is a data set for reconstruction, or has one as a subfolder."""
    return bool(_sets(root))


def read_posed_views(root: Path) -> PosedViews:
    """The views of every data set in `root`. One that cannot be read is left out, and one with lens distortion, which
    labels cannot say: its images would not fit them."""
    views = PosedViews({}, {}, {})
    for folder in _sets(root):
        person = folder.resolve().name
        try:
            rows = read_rows(folder)
        except ValueError as error:
            views.left_out[person] = str(error)
            continue
        if rows.distortion is not None:
            views.left_out[person] = f"{rows.distortion}; undistort the images first (colmap image_undistorter)"
            continue
        for name, label in zip(rows.names, rows.labels, strict=True):
            image = os.path.relpath(_image(folder, name), root)
            views.labels[image], views.people[image] = label, person
    return views


def _sets(root: Path) -> list[Path]:
    folders = [root] if _is_set(root) else [path for path in root.iterdir() if path.is_dir() and _is_set(path)]
    return sorted(folders, key=lambda path: natural_key(path.name))


def _is_set(folder: Path) -> bool:
    return reconstruction_in(folder) is not None or binary_model_in(folder) is not None


def _image(folder: Path, name: str) -> Path:
    """The file that a data set names; where there is none, the first place in which it was looked for."""
    places = [below / (name + suffix) for below in (folder, folder / IMAGE_FOLDER) for suffix in SUFFIXES]
    return next((place for place in places if place.is_file()), places[0])
