"""Is there a face, and whose is it? By dlib's networks, which never saw this project's images.

The packages of `diffportrait3d.portraits.detector` bring everything: its detector and 5 landmarks, and a face embedding
of 128 numbers. This is dlib, NOT ArcFace: its figures cannot be set beside those of papers. Cosines of
different people are high (the embeddings share a large mean), so that they mean something only beside their baselines:
true views of the same person, other people, and the rank of the right person among all.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import numpy as np
from torch import Tensor

from diffportrait3d.files import file_hash, write_atomically
from diffportrait3d.images import as_pixels
from diffportrait3d.portraits.detector import FaceDetector, model_folder

from ..subjects.dataset import resize
from .metric import Metric

EMBEDDING = "dlib_face_recognition_resnet_model_v1.dat"
SIDE = 256  # pixels that every image is resized to: the detector wants faces of 80, and sizes stay comparable
NUMBERS = 128  # of an embedding
NEAR_YAW = 60.0  # degrees

FACE_METRICS = {
    "dlib_found": Metric("faces found (dlib)", 3, more_is_better=True),
    "dlib_found_near": Metric(f"found to {NEAR_YAW:.0f} deg of yaw (dlib)", 3, more_is_better=True),
    "dlib_id_reference": Metric("ID, reference (dlib cosine)", 3, more_is_better=True),
    "dlib_id_truth": Metric("ID, truth (dlib cosine)", 3, more_is_better=True),
    "dlib_distance_reference": Metric("distance to reference (dlib)", 3),
    "dlib_distance_truth": Metric("distance to truth (dlib)", 3),
    "dlib_first": Metric("right person first (dlib)", 3, more_is_better=True),
    "dlib_rank": Metric("rank of the right person (dlib)", 2),
}
OTHERS = "other_people"  # a row: the true views of everybody else


class FaceNetworks:
    """Detector, landmarks and embedding, on the CPU.

    Args:
        cache: folder in which embeddings are kept by the images they are of; None keeps none.

    Raises:
        FacesMissing: the packages are not installed.
    """

    def __init__(self, cache: Path | None = None):
        self.detector = FaceDetector()
        import dlib

        files = self.detector.files | {"embedding": self.detector.files["detector"].with_name(EMBEDDING)}
        self.sha256 = {name: file_hash(path) for name, path in files.items()}
        self.network = dlib.face_recognition_model_v1(str(files["embedding"]))
        self.cache = cache

    def embeddings(self, images: Tensor) -> np.ndarray:
        """Images [N, 3, H, W] in [0, 1] -> float32 [N, 128]; a row of NaN where no face is found."""
        pixels = as_pixels(resize(images, SIDE))
        if self.cache is None:
            return self._embeddings(pixels)
        digest = hashlib.sha256(repr((pixels.shape, sorted(self.sha256.items()))).encode())
        digest.update(pixels.tobytes())
        path = self.cache / f"{digest.hexdigest()[:32]}.npy"
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError):  # missing or damaged
            found = self._embeddings(pixels)
            write_atomically(path, lambda file: np.save(file, found), durable=False)
            return found

    def _embeddings(self, pixels: np.ndarray) -> np.ndarray:
        return np.stack([self._embedding(image) for image in pixels])

    def _embedding(self, image: np.ndarray) -> np.ndarray:
        """Of the face that the detector is surest of, [128]."""
        shape = self.detector.shape(image)
        if shape is None:
            return np.full(NUMBERS, np.nan, dtype=np.float32)
        numbers = self.network.compute_face_descriptor(image, shape)
        return np.asarray(numbers, dtype=np.float32)


def load_face_networks(wanted: bool | None, cache: Path | None = None) -> FaceNetworks | None:
    """dlib's networks; None if they are not `wanted` (False), or not installed and not asked for (None)."""
    if wanted is False or (wanted is None and model_folder() is None):
        return None
    return FaceNetworks(cache)


def pack(embeddings: np.ndarray) -> str:
    """float32 [N, 128] as text, exact and shorter than its numbers."""
    return base64.b64encode(np.ascontiguousarray(embeddings, dtype="<f4").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """What `pack` was given."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(-1, NUMBERS)


def face_metrics(people: list[dict]) -> list[dict[str, dict[str, float]]]:
    """FACE_METRICS of every row of every person, means over views; NaN where a metric does not exist.

    people: one dict per person: "reference" embedding [128], "yaws" [V] of the views, degrees (absent: not known) and
    "rows": embeddings [V, 128] by row, of which "ground_truth" holds the true views. NaN rows of an embedding: no face.

    ID and distance count views in which a face is found, to the portrait and to the true view at the same camera. The
    rank is that of the person's portrait among the portraits of all people, the nearest first; 1 is right. The row
    OTHERS has the true views of all other people against this one's portrait and true views.
    """
    gallery = np.stack([person["reference"] for person in people])  # [P, 128]
    return [
        {row: _row_metrics(row, found, people[k], k, gallery) for row, found in people[k]["rows"].items()}
        | {OTHERS: _others(k, people)}
        for k in range(len(people))
    ]


def add_face_metrics(records: list[dict]) -> None:
    """Replace the packed embeddings of records by the metrics that need those of all people."""
    people = []
    for record in records:
        found = record.pop("faces")
        rows = {name: unpack(text) for name, text in found["rows"].items()}
        people.append({"reference": unpack(found["reference"])[0], "yaws": found["yaws"], "rows": rows})
    for record, metrics in zip(records, face_metrics(people), strict=True):
        rows = [*record["results"], OTHERS]
        record["results"] = {row: record["results"].get(row, {}) | metrics[row] for row in rows}


def _row_metrics(row: str, found: np.ndarray, person: dict, own: int, gallery: np.ndarray) -> dict[str, float]:
    faces = ~np.isnan(found).any(-1)  # [V]
    truth, nothing = person["rows"]["ground_truth"], float("nan")
    near = np.abs(person["yaws"]) <= NEAR_YAW if "yaws" in person else np.zeros(len(faces), dtype=bool)
    distances = _distances(found, gallery)  # [V, P]
    ranks = 1 + (distances < distances[:, own : own + 1]).sum(1)  # [V]
    ranked = faces & ~np.isnan(gallery[own]).any()
    known = row != "ground_truth"  # the truth is the same as itself
    return {
        "dlib_found": float(faces.mean()),
        "dlib_found_near": float(faces[near].mean()) if near.any() else nothing,
        "dlib_id_reference": _mean(_cosines(found, gallery[own : own + 1])),
        "dlib_id_truth": _mean(_cosines(found, truth, paired=True)) if known else nothing,
        "dlib_distance_reference": _mean(distances[:, own]),
        "dlib_distance_truth": _mean(np.linalg.norm(found - truth, axis=-1)) if known else nothing,
        "dlib_first": float((ranks == 1)[ranked].mean()) if ranked.any() else nothing,
        "dlib_rank": float(ranks[ranked].mean()) if ranked.any() else nothing,
    }


def _others(own: int, people: list[dict]) -> dict[str, float]:
    """The true views of everybody but one against that one; NaN if there is nobody else."""
    values = dict.fromkeys(FACE_METRICS, float("nan"))
    if len(people) > 1:
        others = np.concatenate([p["rows"]["ground_truth"] for k, p in enumerate(people) if k != own])
        portrait, truth = people[own]["reference"][None], people[own]["rows"]["ground_truth"]
        values |= {
            "dlib_id_reference": _mean(_cosines(others, portrait)),
            "dlib_id_truth": _mean(_cosines(others, truth)),
            "dlib_distance_reference": _mean(_distances(others, portrait)),
            "dlib_distance_truth": _mean(_distances(others, truth)),
        }
    return values


def _cosines(first: np.ndarray, second: np.ndarray, paired: bool = False) -> np.ndarray:
    """[N, 128] and [M, 128] -> [N, M], or [N] of the pairs."""
    first, second = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (first, second))
    return (first * second).sum(-1) if paired else first @ second.T


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[N, 128] and [M, 128] -> [N, M], Euclidean; dlib's authors take 0.6 for the border of one person."""
    return np.linalg.norm(first[:, None] - second[None], axis=-1)


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
