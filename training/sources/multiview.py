"""A data set of this project's own format (rendered heads, another import) as a part of a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffportrait3d.cameras import validate_labels

from ..data import read_manifest
from .eg3d import resized
from .groups import Group, PortraitView, SkippedGroup, folder_name, read_picture


class MultiView:
    """Every subject of the data set at `root`, in the split it has there. Portraits and cameras are taken over; the
    conditions are made anew like everybody else's, and depth, which only a rendered head has, stays behind."""

    name = "heads"

    def __init__(self, root: Path):
        self.root = root

    def settings(self) -> dict[str, Any]:
        return {}

    def groups(self) -> list[Group]:
        _, subjects = read_manifest(self.root)
        return [
            Group(
                folder_name(subject["id"]),
                subject.get("person", subject["id"]),
                subject["split"],
                {"views": [{"image": view["image"], "label": view["label"]} for view in subject["views"]]},
            )
            for subject in subjects
        ]

    def views(self, group: Group, resolution: int) -> list[PortraitView]:
        names = [view["image"] for view in group.place["views"]]
        try:
            labels = validate_labels(torch.tensor([v["label"] for v in group.place["views"]]), "manifest.jsonl", names)
        except (TypeError, ValueError) as error:
            raise SkippedGroup(f"camera labels: {error}") from None
        images = [read_picture(self.root / name) for name in names]
        return [
            PortraitView(resized(image.as_bytes(), resolution), label, name, image.notes)
            for image, label, name in zip(images, labels, names, strict=True)
        ]
