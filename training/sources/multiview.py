"""A data set of this project's own format (rendered heads, another import) as a part of a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffportrait3d.cameras.labels import validate_labels

from ..dataset.images import read_manifest
from .groups import SPLITS, PortraitView, SkippedGroup, ViewGroup, folder_name, read_view, resized


class MultiView:
    """Every subject of the data set at `root`, in the split it has there. Portraits and cameras are taken over; the
    conditions are made again, as for every source, and depth, which only a rendered head has, is dropped."""

    name = "heads"

    def __init__(self, root: Path):
        self.root = root
        self.left_out: dict[str, str] = {}

    def settings(self) -> dict[str, Any]:
        return {}

    def groups(self) -> list[ViewGroup]:
        _, subjects = read_manifest(self.root)
        self.left_out.clear()
        planned: dict[str, ViewGroup] = {}
        for number, subject in enumerate(subjects):
            try:
                group = _group(subject)
            except (KeyError, TypeError) as error:
                self.left_out[f"subject {number}"] = f"its line in the manifest is incomplete ({error!r})"
                continue
            if group.split not in SPLITS:
                self.left_out[group.id] = f"split {group.split!r} is none of {', '.join(SPLITS)}"
            elif group.id in planned:
                self.left_out[f"subject {number}"] = f"another subject has the id {group.id!r}"
            else:
                planned[group.id] = group
        return list(planned.values())

    def views(self, group: ViewGroup, resolution: int) -> list[PortraitView]:
        names = [view["image"] for view in group.place["views"]]
        try:
            labels = validate_labels(torch.tensor([v["label"] for v in group.place["views"]]), "manifest.jsonl", names)
        except (TypeError, ValueError) as error:
            raise SkippedGroup(f"camera labels: {error}") from None
        images = [read_view(self.root / name) for name in names]
        return [
            PortraitView(resized(image.as_bytes(), resolution), label, name, image.notes)
            for image, label, name in zip(images, labels, names, strict=True)
        ]


def _group(subject: dict[str, Any]) -> ViewGroup:
    views = [{"image": view["image"], "label": view["label"]} for view in subject["views"]]
    return ViewGroup(
        folder_name(subject["id"]), subject.get("person", subject["id"]), subject["split"], {"views": views}
    )
