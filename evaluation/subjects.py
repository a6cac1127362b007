"""Held-out subjects of a rendered dataset, with the exact depth that only the test split has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data import DataError, read_manifest


@dataclass
class Subject:
    """A reference view and V other views. Images [.., 3, H, W] in [0, 1], labels [.., 25] (EG3D)."""

    id: str
    digest: str  # sha256 of the subject's line in the manifest
    reference: Tensor  # [1, 3, H, W]
    reference_label: Tensor  # [1, 25]
    images: Tensor  # [V, 3, H, W], the ground truth
    conditions: Tensor  # [V, 3, H, W], another identity at the same cameras
    labels: Tensor  # [V, 25]
    depth: Tensor  # [V, H, W] camera z, 0 = background
    mask: Tensor  # [V, H, W] bool, foreground


def held_out_subjects(root: str | Path, count: int, views: int, start: int = 0) -> Iterator[Subject]:
    """Subjects start..count-1 of split test: their first view is the reference, the next `views` are targets.

    Raises DataError if there are fewer subjects or views, or if a file cannot be read.
    """
    root = Path(root)
    _, subjects = read_manifest(root)
    test = [s for s in subjects if s["split"] == "test"]
    if len(test) < count:
        raise DataError(f"'{root}' has {len(test)} test subjects of {count}; use --identities {len(test)}.")
    for subject in test[start:count]:
        if len(subject["views"]) < views + 1:
            raise DataError(
                f"Subject {subject['id']} in '{root}' has {len(subject['views'])} views; a reference and {views} "
                f"targets need {views + 1}. Use --views {len(subject['views']) - 1} or render more."
            )
        yield _load(root, subject, views)


def subject_digest(line: dict) -> str:
    """sha256 of a manifest line."""
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()


def _load(root: Path, line: dict, views: int) -> Subject:
    name = line["id"]
    reference, *targets = line["views"][: views + 1]
    depth, mask = zip(*(_read_depth(root / _depth_file(name, view)) for view in targets), strict=True)
    return Subject(
        id=name,
        digest=subject_digest(line),
        reference=_read_image(root / reference["image"])[None],
        reference_label=torch.tensor([reference["label"]], dtype=torch.float32),
        images=torch.stack([_read_image(root / view["image"]) for view in targets]),
        conditions=torch.stack([_read_image(root / view["condition"]) for view in targets]),
        labels=torch.tensor([view["label"] for view in targets], dtype=torch.float32),
        depth=torch.stack(depth),
        mask=torch.stack(mask),
    )


def _depth_file(name: str, view: dict) -> str:
    if "depth" not in view:
        raise DataError(f"Subject {name} has no depth for view {view['image']}; render the test split again.")
    return view["depth"]


def _read_image(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255  # [H, W, 3]
    except OSError as error:
        raise DataError(f"Image '{path}' cannot be read ({error}); render the dataset again, it resumes.") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _read_depth(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path) as file:
            depth, mask = file["depth"].astype(np.float32), file["mask"].astype(bool)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"Depth '{path}' cannot be read ({error}); render the dataset again, it resumes.") from None
    return torch.from_numpy(depth), torch.from_numpy(mask)
