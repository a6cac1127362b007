"""Camera conditions of an imported data set: another identity at every view's camera.

Either drawn by this project's renderer, or taken from a folder of renders (EG3D's, in the paper) that has an image at
the same relative path as every portrait. `cameras.json`, written beside the manifest in EG3D's own form, says which
images and cameras those are.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffportrait3d.images import NoteLog, as_pixels
from diffportrait3d.synthetic_heads import Scene, portrait_scene, render_views

from ..dataset.images import FIRST_CONDITION, DataError
from .reader import SkippedGroup, read_json, read_square, resized

LARGEST_DIFFERENCE = 1e-3  # between a render's label and its portrait's

_scene = lru_cache(maxsize=64)(portrait_scene)


class RenderedConditions:
    """Analytic people of our own renderer; val and test have other people than train."""

    def __init__(self, people: int = 64):
        if people < 1:
            raise DataError(f"Conditions need at least one person, got {people}.")
        self.people = people
        self.kind = f"rendered by {people} people"

    def image(self, record: dict[str, Any], number: int, resolution: int) -> tuple[np.ndarray, str]:
        """uint8 [R, R, 3] for view `number` of a subject's record, and whom it shows."""
        view = record["views"][number]
        rng = np.random.default_rng(list(f"{view['image']}".encode()))
        person = FIRST_CONDITION[record["split"]] + int(rng.integers(self.people))
        scene: Scene = _scene(person)
        image = render_views(scene, torch.tensor([view["label"]]), resolution).image[0]  # [3, R, R]
        return as_pixels(image), f"analytic-{person:07d}"


class GivenConditions:
    """Renders below a folder. Its `dataset.json`, if there is one, must hold the portraits' own labels; its
    `people.json` {"path of a render": "whom it shows"} names the people, who are otherwise taken to be all different.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DataError(f"There is no folder '{folder}' with renders for the camera conditions.")
        self.folder = folder
        self.kind = f"given by {folder.name}"
        self._report = NoteLog()

    @cached_property
    def _labels(self) -> dict[str, list[float]]:
        path = self.folder / "dataset.json"
        return dict(read_json(path, "labels of the renders")["labels"]) if path.is_file() else {}

    @cached_property
    def _people(self) -> dict[str, str]:
        path = self.folder / "people.json"
        return read_json(path, "people of the renders") if path.is_file() else {}

    def image(self, record: dict[str, Any], number: int, resolution: int) -> tuple[np.ndarray, str]:
        """uint8 [R, R, 3] for view `number` of a subject's record, and whom it shows."""
        view = record["views"][number]
        name = view["image"]
        self._check_label(name, view["label"])
        try:
            image = self._report(self.folder / name, read_square(self.folder / name))
        except SkippedGroup as error:
            raise DataError(
                f"Condition {error}. Render every camera of 'cameras.json' with EG3D and save it below "
                f"'{self.folder}' under the same name, then run this again; it continues here."
            ) from None
        return resized(image, resolution), str(self._people.get(name, f"render-{Path(name).with_suffix('')}"))

    def _check_label(self, name: str, label: list[float]) -> None:
        if self._labels and name not in self._labels:
            raise DataError(f"'{self.folder / 'dataset.json'}' has no label for '{name}'.")
        given = self._labels.get(name, label)
        off = np.abs(np.array(given, dtype=float) - np.array(label)).max() if len(given) == len(label) else np.inf
        if not off <= LARGEST_DIFFERENCE:
            raise DataError(
                f"'{self.folder / name}' was rendered at another camera than its portrait's (labels differ by "
                f"{off:.3g}); render the cameras of 'cameras.json'."
            )
