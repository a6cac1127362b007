"""A data set of this project's own format (rendered heads, another import) as a part of a larger one."""

from __future__ import annotations

from ..dataset.images import SPLITS, read_manifest
from .reader import PortraitView, Reader, ViewGroup, checked_labels, folder_name


class MultiView(Reader):
    """Every subject of the data set, in the split it has there. Portraits and cameras are taken over; the conditions
    are made anew, as for every source, and depth, which only a rendered head has, is not copied."""

    help = "a data set of this format, such as training.render writes"

    def groups(self) -> list[ViewGroup]:
        _, subjects = read_manifest(self.root)
        self.left_out.clear()
        planned: dict[str, ViewGroup] = {}
        for number, subject in enumerate(subjects):
            try:
                views = [{"image": view["image"], "label": view["label"]} for view in subject["views"]]
                person = subject.get("person", subject["id"])
                group = ViewGroup(folder_name(subject["id"]), person, subject["split"], {"views": views})
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
        views = group.place["views"]
        names = [view["image"] for view in views]
        labels = checked_labels([view["label"] for view in views], names, "manifest.jsonl")
        return self.square_views(names, labels, resolution)
