"""Exports of 3D-aware GANs (EG3D, PanoHead): a folder of images and `dataset.json` with their camera labels.

    {"labels": [["seed0001/00.png", [25 numbers]], ...]}

Views of one person share the part of their names before the last "/", "_" or "-" (`--identity` gives another rule).
Without `dataset.json`, data sets for 3D reconstruction are read (nerfstudio's `transforms.json`, COLMAP's text files;
Export Views writes both): the folder is one, or has some as its subfolders, one person each.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffportrait3d.cameras.files import read_rows
from diffportrait3d.cameras.labels import split_label
from diffportrait3d.cameras.projection import world_to_camera
from diffportrait3d.cameras.reconstructions import binary_model_in, reconstruction_in
from diffportrait3d.files import natural_key

from ..dataset.images import DataError
from .alignment import Camera, aligned_views, triangulate_face
from .landmarks import read_points
from .reader import (
    OUTSIDE,
    PhotographReader,
    PortraitView,
    SkippedGroup,
    ViewGroup,
    checked_labels,
    folder_name,
    read_json,
    read_square,
)

IDENTITY = r"(.+)[/_-][^/_-]+"
SINGLE_VIEWS = re.compile(r"\d{5}/img\d{8}(_mirror)?\.\w+")  # how EG3D and StyleGAN keep one image a person

IMAGE_FOLDER = "images"  # where the names of COLMAP begin
SUFFIXES = ("", ".png", ".jpg", ".jpeg")  # the Blender scenes name their images without


class ListedViews(NamedTuple):
    """labels: image, relative to the source -> its label, not checked yet. people: image -> whom it shows, where the
    source says it."""

    labels: dict[str, Any]
    people: dict[str, str]


@dataclass(frozen=True)
class Options:
    """identity: regular expression, its first group names the person in a file name without suffix. views: largest
    number of views a person, evenly spread; 0 takes all."""

    identity: str = IDENTITY
    views: int = 0
    tolerance: float = 0.02
    outside: str = OUTSIDE[0]


class Export(PhotographReader):
    """People of an export. With `landmarks` (`NAME.txt` for every `NAME.png`) the cameras are moved into EG3D's world
    by the person's five points and the images cropped again; without, images and labels are taken as they are."""

    help = "a folder of the generator's images with dataset.json"
    options_class = Options

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        super().add_options(parser)
        parser.add_argument("--views", type=int, help="largest number of views a person (0: all)")
        parser.add_argument("--identity", help="regular expression: whom a file name shows")

    def settings(self) -> dict[str, Any]:
        return {**vars(self.options), "aligned": self.landmarks is not None, "splits": self.splits.settings()}

    def groups(self) -> list[ViewGroup]:
        people = self._people()
        if all(len(names) < 2 for names in people.values()):
            raise DataError(
                f"Every one of the {len(people)} people in '{self.root}' has a single view, but a reference and a "
                "target are two; name a person's views alike (seed0001/00.png, seed0001/01.png), or give --identity."
            )
        planned: dict[str, ViewGroup] = {}
        for identity, names in people.items():
            person = f"{self.name}-{folder_name(identity)}"
            if person in planned:
                self.left_out[identity] = f"as a folder it would have the name of another person, '{person}'"
            elif split := self.splits.of(person):
                count = min(self.options.views or len(names), len(names))
                chosen = np.linspace(0, len(names) - 1, count).round().astype(int)
                planned[person] = ViewGroup(person, person, split, {"files": [names[i] for i in chosen]})
        return list(planned.values())

    def _people(self) -> dict[str, list[str]]:
        """Names of files by person; names that do not tell whom they show are left out.

        Raises:
            DataError: none of them does.
        """
        people: dict[str, list[str]] = {}
        for name in sorted(self._listed.labels, key=natural_key):
            with self.leaving_out(name):
                people.setdefault(self._identity(name), []).append(name)
        if not people:
            raise DataError(f"{next(iter(self.left_out.values()))}.")
        return people

    def views(self, group: ViewGroup, resolution: int) -> list[PortraitView]:
        names = group.place["files"]
        if len(names) < 2:
            raise SkippedGroup(f"'{names[0]}' is the only view")
        rows = [self._listed.labels[name] for name in names]
        labels = checked_labels(rows, names, self.root.name if self._listed.people else "dataset.json")
        if self.landmarks is None:
            return self.square_views(names, labels, resolution)
        images = {name: read_square(self.root / name) for name in names}
        cameras, points = {}, {}
        for (name, image), label in zip(images.items(), labels.double(), strict=True):
            cameras[name] = Camera(world_to_camera(label), split_label(label)[1])
            path = (self.landmarks / name).with_suffix(".txt")
            if path.is_file():  # a profile or the back of a head has none
                points[name] = (read_points(path) + 0.5) / len(image.pixels)
        face = triangulate_face(points, cameras, self.options.tolerance)
        return [view for view, _ in aligned_views(images, cameras, face, resolution, self.options.outside)]

    @cached_property
    def _listed(self) -> ListedViews:
        path = self.root / "dataset.json"
        return ListedViews(self._read_dataset_json(path), {}) if path.is_file() else self._read_reconstructions()

    def _read_dataset_json(self, path: Path) -> dict[str, Any]:
        content = read_json(path, "camera labels, as EG3D keeps them")
        rows = content.get("labels") if isinstance(content, dict) else content
        rows = list(rows.items()) if isinstance(rows, dict) else rows
        rows = rows if isinstance(rows, list) else []
        pairs = [row for row in rows if isinstance(row, list | tuple) and len(row) == 2]
        if not pairs:
            raise DataError(f"'{path}' has no \"labels\": [[name, [25 numbers]], ...].")
        if len(pairs) < len(rows):
            self.left_out["dataset.json"] = f"{len(rows) - len(pairs)} rows that are not [name, [25 numbers]]"
        return {str(name): label for name, label in pairs}

    def _read_reconstructions(self) -> ListedViews:
        """One that cannot be read is left out, and one with lens distortion, which labels cannot say: its images would
        not fit them."""
        folders = [path for path in self.root.iterdir() if path.is_dir() and _is_reconstruction(path)]
        folders = [self.root] if _is_reconstruction(self.root) else folders
        if not folders:
            raise DataError(
                f"There is no dataset.json with camera labels in '{self.root}', nor transforms.json or COLMAP's text "
                "files, there or in one of its folders."
            )
        listed = ListedViews({}, {})
        for folder in sorted(folders, key=lambda path: natural_key(path.name)):
            person = folder.resolve().name
            try:
                rows = read_rows(folder)
            except ValueError as error:
                self.left_out[person] = str(error)
                continue
            if rows.distortion is not None:
                advice = "undistort the images first (colmap image_undistorter)"
                self.left_out[person] = f"{rows.distortion}; {advice}"
                continue
            for name, label in zip(rows.names, rows.labels, strict=True):
                image = os.path.relpath(_image_path(folder, name), self.root)
                listed.labels[image], listed.people[image] = label, person
        if not listed.labels:
            raise DataError("; ".join(f"{name}: {reason}" for name, reason in self.left_out.items()))
        return listed

    def _identity(self, name: str) -> str:
        if self.options.identity == IDENTITY and name in self._listed.people:
            return self._listed.people[name]
        if self.options.identity == IDENTITY and SINGLE_VIEWS.fullmatch(name):
            raise DataError(
                f"'{self.root / 'dataset.json'}' names images such as '{name}', one image a person; groups need "
                "several views of one person. --identity says how a name tells the person, if these are views."
            )
        match = re.fullmatch(self.options.identity, str(Path(name).with_suffix("")))
        if not match or not match.groups():
            raise DataError(f"The name '{name}' does not tell whom it shows by --identity '{self.options.identity}'.")
        return match.group(1)


def _is_reconstruction(folder: Path) -> bool:
    return reconstruction_in(folder) is not None or binary_model_in(folder) is not None


def _image_path(folder: Path, name: str) -> Path:
    """The file that a data set names; where there is none, the first path that was tried."""
    paths = [below / (name + suffix) for below in (folder, folder / IMAGE_FOLDER) for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])
