"""Generated views and their ground truth as files, written by `evaluation.generate` and read by `evaluation.paper`.

    VIEWS/views.json              {"format": "diffportrait3d-views", "version": 1, "task": "novel" | "reconstruction",
                                   "reference": "aligned" | "unaligned", and any facts about how they were made}
    VIEWS/<identity>/reference.png
    VIEWS/<identity>/00_generated.png, 00_truth.png, 01_generated.png, 01_truth.png, ...
                     00_mask.png             optional: foreground of the truth, white
                     00_generated_mask.png   optional: foreground of the generated view, white; else the truth's

Any size, square. Anything that generates portraits can be measured by writing this layout.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffportrait3d.files import json_object, write_folder, write_text
from diffportrait3d.images import save_image
from training.dataset.images import DataError

from .dataset import read_image

FORMAT, VERSION = "diffportrait3d-views", 1
TASKS, REFERENCES = ("novel", "reconstruction"), ("aligned", "unaligned")


@dataclass
class Views:
    """One identity. Images [.., 3, H, W] in [0, 1], masks [V, 1, H, W] in [0, 1] or None."""

    id: str
    reference: Tensor  # [1, 3, H, W]
    generated: Tensor  # [V, 3, H, W]
    truth: Tensor  # [V, 3, H, W]
    mask: Tensor | None = None
    generated_mask: Tensor | None = None


def write_header(root: Path, task: str, reference: str, **facts) -> None:
    """Start a folder; DataError if it holds views of other settings."""
    header = {"format": FORMAT, "version": VERSION, "task": task, "reference": reference, **facts}
    path = root / "views.json"
    if path.is_file() and (found := _read_header(path)) != header:
        differing = sorted(k for k in header.keys() | found.keys() if header.get(k) != found.get(k))
        raise DataError(f"'{root}' holds views made with other {', '.join(differing)}; choose another --out.")
    write_text(path, json.dumps(header, indent=1) + "\n")


def write_views(root: Path, views: Views) -> None:
    """The folder of one identity, whole or not at all."""
    kinds = {"generated": views.generated, "truth": views.truth, "mask": views.mask}

    def fill(folder: Path) -> None:
        save_image(folder / "reference.png", views.reference[0], durable=False)
        for kind, images in kinds.items():
            for k, image in enumerate(() if images is None else images):
                save_image(folder / f"{k:02d}_{kind}.png", image.expand(3, -1, -1), durable=False)

    write_folder(root / views.id, fill)


def read_header(root: Path) -> dict:
    """views.json, checked."""
    path = root / "views.json"
    if not path.is_file():
        raise DataError(f"No views at '{path}'; make them with 'python -m evaluation.generate' (docs/evaluation.md).")
    header = _read_header(path)
    for name, choices in (("format", (FORMAT,)), ("version", (VERSION,)), ("task", TASKS), ("reference", REFERENCES)):
        if header.get(name) not in choices:
            allowed = ", ".join(map(str, choices))
            raise DataError(f"'{path}' has {name} {header.get(name)!r}; it must be one of {allowed}.")
    return header


def _read_header(path: Path) -> dict:
    header = json_object(path.read_bytes())
    if header is None:
        raise DataError(
            f"'{path}' is damaged, so that it is not known how the views beside it were made: write it again by hand "
            "(docs/evaluation.md), or delete the folder and generate them again."
        )
    return header


def identities(root: Path) -> list[Path]:
    """Folders of identities, sorted by name; DataError if there are none."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"'{root}' has no folder of an identity; see docs/evaluation.md for the layout.")
    return folders


def read_views(folder: Path) -> Views:
    """One identity's images; DataError names what is missing."""
    names = sorted(path.name.removesuffix("_generated.png") for path in folder.glob("*_generated.png"))
    if not names:
        raise DataError(f"'{folder}' has no NN_generated.png; see docs/evaluation.md for the layout.")
    return Views(
        id=folder.name,
        reference=read_image(folder / "reference.png")[None],
        generated=torch.stack([read_image(folder / f"{name}_generated.png") for name in names]),
        truth=torch.stack([read_image(folder / f"{name}_truth.png") for name in names]),
        mask=_masks(folder, names, "mask"),
        generated_mask=_masks(folder, names, "generated_mask"),
    )


def _masks(folder: Path, names: list[str], kind: str) -> Tensor | None:
    paths = [folder / f"{name}_{kind}.png" for name in names]
    if not all(path.is_file() for path in paths):
        return None
    return torch.stack([read_image(path)[:1] for path in paths])
