"""Exports of 3D-aware GANs (EG3D, PanoHead): a folder of images and `dataset.json` with their camera labels.

    {"labels": [["seed0001/00.png", [25 numbers]], ...]}

Views of one person share the part of their names before the last "/", "_" or "-" (`--identity` gives another rule).
Without `dataset.json`, data sets for 3D reconstruction are read, see `reconstruction`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diffportrait3d.cameras.files import label_table, without_wrapping
from diffportrait3d.cameras.labels import split_label, validate_labels
from diffportrait3d.cameras.projection import world_to_camera
from diffportrait3d.files import natural_key
from diffportrait3d.images import UserImage

from ..dataset.images import DataError
from .alignment import OUTSIDE, Camera, eg3d_crop, head_similarity, triangulate_face, warp
from .groups import PortraitView, SkippedGroup, Splits, ViewGroup, folder_name, read_json, read_view, reason_of, resized
from .landmarks import read_points
from .reconstruction import has_posed_views, read_posed_views

IDENTITY = r"(.+)[/_-][^/_-]+"
SINGLE_VIEWS = re.compile(r"\d{5}/img\d{8}(_mirror)?\.\w+")  # how EG3D and StyleGAN keep one image a person


@dataclass(frozen=True)
class Options:
    """identity: regular expression, its first group names the person in a file name without suffix. views: largest
    number of views a person, evenly spread; 0 takes all. tolerance: see `triangulate_face`."""

    identity: str = IDENTITY
    views: int = 0
    tolerance: float = 0.02
    outside: str = OUTSIDE[0]


class Export:
    """People of an export. With `landmarks` (`NAME.txt` for every `NAME.png`) the cameras are moved into EG3D's world
    by the person's five points and the images cropped again; without, images and labels are taken as they are."""

    def __init__(self, name: str, root: Path, splits: Splits, options: Options, landmarks: Path | None = None):
        self.name, self.root, self.splits, self.options, self.landmarks = name, root, splits, options, landmarks
        self.left_out: dict[str, str] = {}
        self._labels: dict[str, Any] | None = None
        self._people_of: dict[str, str] = {}  # whom a name shows, where the source says it

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
                planned[person] = ViewGroup(person, person, split, {"files": self._spread(names)})
        return list(planned.values())

    def _people(self) -> dict[str, list[str]]:
        """Names of files by person; names that do not tell whom they show are left out.

        Raises:
            DataError: none of them does.
        """
        people: dict[str, list[str]] = {}
        for name in sorted(self._read_labels(), key=natural_key):
            try:
                people.setdefault(self._identity(name), []).append(name)
            except DataError as error:
                self.left_out[name] = reason_of(error)
        if not people:
            raise DataError(f"{next(iter(self.left_out.values()))}.")
        return people

    def views(self, group: ViewGroup, resolution: int) -> list[PortraitView]:
        names = group.place["files"]
        if len(names) < 2:
            raise SkippedGroup(f"'{names[0]}' is the only view")
        labels = self._checked_labels(names)
        images = [read_view(self.root / name) for name in names]
        for name, image in zip(names, images, strict=True):
            height, width = image.pixels.shape[:2]
            if height != width:
                raise SkippedGroup(f"'{name}' is {width}x{height}, not square")
        if self.landmarks is not None:
            return self._aligned(names, labels, images, resolution)
        return [
            PortraitView(resized(image.as_bytes(), resolution), label, name, image.notes)
            for name, image, label in zip(names, images, labels, strict=True)
        ]

    def _aligned(
        self, names: list[str], labels: Tensor, images: list[UserImage], resolution: int
    ) -> list[PortraitView]:
        cameras, places = {}, {}
        for name, label, image in zip(names, labels.double(), images, strict=True):
            cameras[name] = Camera(world_to_camera(label), split_label(label)[1])
            path = (self.landmarks / name).with_suffix(".txt")
            if path.is_file():  # a profile or the back of a head has none
                places[name] = (read_points(path) + 0.5) / image.pixels.shape[0]
        similarity = head_similarity(triangulate_face(places, cameras, self.options.tolerance))
        crops = {name: eg3d_crop(cameras[name], similarity) for name in names}
        outside = self.options.outside
        return [
            PortraitView(warp(image.as_bytes(), crop.homography, resolution, outside)[0], crop.label, name, image.notes)
            for (name, crop), image in zip(crops.items(), images, strict=True)
        ]

    def _read_labels(self) -> dict[str, Any]:
        path = self.root / "dataset.json"
        if self._labels is None and not path.is_file():
            self._labels = self._read_posed_views()
        if self._labels is None:
            content = read_json(path, "camera labels, as EG3D keeps them")
            rows = content.get("labels") if isinstance(content, dict) else content
            rows = list(rows.items()) if isinstance(rows, dict) else rows
            rows = rows if isinstance(rows, list) else []
            pairs = [row for row in rows if isinstance(row, list | tuple) and len(row) == 2]
            if not pairs:
                raise DataError(f"'{path}' has no \"labels\": [[name, [25 numbers]], ...].")
            if len(pairs) < len(rows):
                self.left_out["dataset.json"] = f"{len(rows) - len(pairs)} rows that are not [name, [25 numbers]]"
            self._labels = {str(name): label for name, label in pairs}
        return self._labels

    def _read_posed_views(self) -> dict[str, Any]:
        if not has_posed_views(self.root):
            raise DataError(
                f"There is no dataset.json with camera labels in '{self.root}', nor transforms.json or COLMAP's text "
                "files, there or in one of its folders."
            )
        views = read_posed_views(self.root)
        self.left_out |= views.left_out
        if not views.labels:
            raise DataError("; ".join(f"{name}: {reason}" for name, reason in views.left_out.items()))
        self._people_of = views.people
        return views.labels

    def _checked_labels(self, names: list[str]) -> Tensor:
        try:
            rows = [without_wrapping(self._read_labels()[name]) for name in names]
            source = self.root.name if self._people_of else "dataset.json"
            return validate_labels(label_table(rows, names), source, names)
        except ValueError as error:
            raise SkippedGroup(f"camera labels: {error}") from None

    def _identity(self, name: str) -> str:
        if self.options.identity == IDENTITY and name in self._people_of:
            return self._people_of[name]
        if self.options.identity == IDENTITY and SINGLE_VIEWS.fullmatch(name):
            raise DataError(
                f"'{self.root / 'dataset.json'}' names images such as '{name}', one image a person; groups need "
                "several views of one person. --identity says how a name tells the person, if these are views."
            )
        match = re.fullmatch(self.options.identity, str(Path(name).with_suffix("")))
        if not match or not match.groups():
            raise DataError(f"The name '{name}' does not tell whom it shows by --identity '{self.options.identity}'.")
        return match.group(1)

    def _spread(self, names: list[str]) -> list[str]:
        wanted = self.options.views
        if not wanted or len(names) <= wanted:
            return names
        return [names[i] for i in np.linspace(0, len(names) - 1, wanted).round().astype(int)]
