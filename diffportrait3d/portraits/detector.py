"""Faces in images by dlib: the packages dlib-bin and face-recognition-models (extra `faces`) bring code and weights.

The package's 68 landmarks, which are not free for commercial use, are never opened; its 5 are: both corners of both
eyes, and the point below the nose. They were trained on photographs under a free licence.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .landmarks import Landmarks

INSTALL = "pip install dlib-bin face-recognition-models"
NUMBERS = (45, 42, 36, 39, 33)  # dlib's five among the 68
SMALLEST = 40  # pixels of an image's side; in a smaller one is no face, and dlib's network raises errors of its own
SIDES = (800, 1600)  # pixels that larger images are searched at, in which faces of 80 are found: first the quicker
_DETECTOR, _LANDMARKS = "mmod_human_face_detector.dat", "shape_predictor_5_face_landmarks.dat"


class FacesMissing(ValueError):
    """The packages are not installed; the message says how to get them."""


def model_folder() -> Path | None:
    """Where face-recognition-models keeps its files; None without it or without dlib.

    The package is not imported: its code needs pkg_resources, which setuptools no longer has.
    """
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or spec.submodule_search_locations is None or importlib.util.find_spec("dlib") is None:
        return None
    return Path(spec.submodule_search_locations[0]) / "models"


class FaceDetector:
    """Detector and landmarks, on the CPU.

    Attributes:
        files: the models' files, by what they are.

    Raises:
        FacesMissing: the packages are not installed.
    """

    def __init__(self) -> None:
        folder = model_folder()
        if folder is None:
            raise FacesMissing(f"The packages that find faces are not installed: {INSTALL}.")
        dlib: Any = importlib.import_module("dlib")  # without types
        self.files = {"detector": folder / _DETECTOR, "landmarks": folder / _LANDMARKS}
        self._rectangle = dlib.rectangle
        self._detector = dlib.cnn_face_detection_model_v1(str(self.files["detector"]))
        self._landmarks = dlib.shape_predictor(str(self.files["landmarks"]))

    def _detect(self, image: np.ndarray) -> Any:
        return self._detector(image, 0) if min(image.shape[:2]) >= SMALLEST else []

    def shape(self, image: np.ndarray) -> Any:
        """dlib's landmarks of the face in uint8 [H, W, 3] that it is surest of; None without a face."""
        faces = self._detect(image)
        return self._landmarks(image, max(faces, key=lambda found: found.confidence).rect) if faces else None

    def faces(self, image: np.ndarray, small: np.ndarray) -> list[Landmarks]:
        """All faces in uint8 [H, W, 3], the largest first. small: the image as it is searched, one of `SIDES` long."""
        zoom = image.shape[0] / small.shape[0]
        boxes = [found.rect for found in self._detect(small)]
        edges = [(box.left(), box.top(), box.right(), box.bottom()) for box in boxes]
        shapes = [self._landmarks(image, self._rectangle(*(round(zoom * edge) for edge in box))) for box in edges]
        points = [[(point.x + 0.5, point.y + 0.5) for point in shape.parts()] for shape in shapes]
        found = [Landmarks(torch.tensor(each, dtype=torch.float64), NUMBERS) for each in points]
        return sorted(found, key=lambda face: face.extent, reverse=True)
