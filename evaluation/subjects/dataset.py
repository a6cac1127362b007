"""Held-out subjects of a dataset, with the exact depth that rendered test splits have."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffportrait3d.images import ImageError, NoteLog
from diffportrait3d.images import read_image as read_user_image
from training.dataset.images import DataError, read_manifest

IDENTITIES = 100  # people that an evaluation takes if it is not told how many
_report = NoteLog()


@dataclass
class Subject:
    """Reference views and V other views. Images [.., 3, H, W] in [0, 1], labels [.., 25] (EG3D)."""

    id: str
    digest: str  # sha256 of the subject's line in the manifest
    reference: Tensor  # [R, 3, H, W], the first one is the portrait
    reference_label: Tensor  # [R, 25]
    images: Tensor  # [V, 3, H, W], the ground truth
    conditions: Tensor  # [V, 3, H, W], another identity at the same cameras
    labels: Tensor  # [V, 25]
    depth: Tensor | None = None  # [V, H, W] camera z, 0 = background
    mask: Tensor | None = None  # [V, H, W] bool, foreground
    other_reference: Tensor | None = None  # [R, 3, H, W], somebody else's portraits
    other_conditions: Tensor | None = None  # [V, 3, H, W], yet another identity at the same cameras


def held_out_lines(root: str | Path, count: int | None) -> list[dict]:
    """Manifest lines of the first `count` subjects of split test; DataError if there are fewer.

    None: up to IDENTITIES, as many as there are.
    """
    test = [s for s in read_manifest(root)[1] if s["split"] == "test"]
    if not test:
        raise DataError(f"'{root}' has no subjects in split 'test'; render or import some.")
    if count is None:
        return test[:IDENTITIES]
    if len(test) < count:
        raise DataError(f"'{root}' has {len(test)} test subjects of {count}; use --identities {len(test)}.")
    return test[:count]


def load_subject(root: Path, line: dict, views: int, references: int = 1, depth: bool = True) -> Subject:
    """A subject by its line in the manifest; `depth` also reads depth and mask.

    Raises:
        DataError: it has too few views, or a file is missing or damaged.
    """
    name, needed = line["id"], views + references
    if len(line["views"]) < needed:
        possible = len(line["views"]) - references
        raise DataError(
            f"Subject {name} in '{root}' has {len(line['views'])} views; {references} references and {views} targets "
            f"need {needed}. Use --views {possible} or render more."
        )
    portrait, *rest = line["views"][:needed]
    targets, portraits = rest[:views], [portrait, *rest[views:]]
    exact = {}
    if depth:
        if missing := [view["image"] for view in targets if "depth" not in view]:
            raise DataError(f"Subject {name} has no depth for view {missing[0]}; render the test split again.")
        pairs = [_read_depth(root / view["depth"]) for view in targets]
        exact = {"depth": torch.stack([d for d, _ in pairs]), "mask": torch.stack([m for _, m in pairs])}
    return Subject(
        id=name,
        digest=json_digest(line),
        reference=read_images(root, portraits, "image"),
        reference_label=_labels(portraits),
        images=read_images(root, targets, "image"),
        conditions=read_images(root, targets, "condition"),
        labels=_labels(targets),
        **exact,
    )


def resize(images: Tensor, size: int) -> Tensor:
    """[N, 3, H, W] to [N, 3, size, size] by antialiased bicubic interpolation, rounded to 8 bits as files would be."""
    if images.shape[-1] != size or images.shape[-2] != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return rounded(images)


def rounded(images: Tensor) -> Tensor:
    """What is left of images in [0, 1] in a file of 8 bits."""
    return (images.clamp(0, 1) * 255).round() / 255


def at_size(subject: Subject, size: int) -> Subject:
    """The subject as networks of another resolution are given it: its images resized, without depth and mask."""
    names = ("reference", "images", "conditions")
    images = {name: resize(getattr(subject, name), size) for name in names}
    return replace(subject, **images, depth=None, mask=None, other_reference=None, other_conditions=None)


def read_images(root: Path, views: list[dict], kind: str) -> Tensor:
    """The images that a manifest names under `kind`, [V, 3, H, W] in [0, 1]."""
    return torch.stack([read_image(root / view[kind]) for view in views])


def _labels(views: list[dict]) -> Tensor:
    return torch.tensor([view["label"] for view in views], dtype=torch.float32)


def json_digest(facts: dict) -> str:
    """sha256 of facts such as a manifest line."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_image(path: Path) -> Tensor:
    """An image file as [3, H, W] in [0, 1]; DataError names the file."""
    try:
        return _report(path, read_user_image(path)).as_tensor()
    except ImageError as error:
        raise DataError(f"Image '{path}' cannot be read ({error.reason}); make its folder again.") from None


def _read_depth(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path) as file:
            depth, mask = file["depth"].astype(np.float32), file["mask"].astype(bool)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"Depth '{path}' cannot be read ({error}); render the dataset again, it resumes.") from None
    return torch.from_numpy(depth), torch.from_numpy(mask)
