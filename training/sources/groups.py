"""What every source delivers: groups of views of one person at one moment, split by person."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from diffportrait3d.files import read_text
from diffportrait3d.images import ImageError, UserImage, read_image

from ..dataset.images import SPLITS, DataError


class SkippedGroup(Exception):
    """This group cannot be used, the others may be; the message says why."""


class PortraitView(NamedTuple):
    """image: uint8 [R, R, 3]; label: [25]; name: which camera or file of the source it is; notes: what the reader
    had to decide about the file."""

    image: np.ndarray
    label: Tensor
    name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ViewGroup:
    """One line of the manifest to be.

    id: unique, usable as a folder's name. person: who it shows; no person is in two splits. place: what the source
    needs to find the images (plain JSON).
    """

    id: str
    person: str
    split: str
    place: dict[str, Any]


class DataSource(Protocol):
    """`settings` decide the images (plain JSON, no paths); `groups` plans and fills `left_out` with what could not be
    planned and why; `views` reads one planned group, and whatever it raises leaves out that group alone."""

    name: str
    left_out: dict[str, str]

    def settings(self) -> dict[str, Any]: ...

    def groups(self) -> list[ViewGroup]: ...

    def views(self, group: ViewGroup, resolution: int) -> list[PortraitView]: ...


class Splits:
    """Which split a person belongs to.

    By default a person's name decides, through its hash, so that the answer never changes when more people are
    downloaded, and is the same for every version of a data set. A file {"train": [names], "val": [...], "test": [...]}
    decides for the people it names and leaves everybody else out.
    """

    def __init__(self, val_share: float, test_share: float, file: Path | None = None):
        if not (0 <= val_share and 0 <= test_share and val_share + test_share <= 1):
            raise DataError(f"Shares of val ({val_share}) and test ({test_share}) must be in 0..1, together at most 1.")
        self.val_share, self.test_share = val_share, test_share
        self.named = None if file is None else _read_split_file(file)

    def settings(self) -> dict[str, Any]:
        if self.named is not None:
            return {"people": dict(sorted(self.named.items()))}
        return {"val_share": self.val_share, "test_share": self.test_share}

    def of(self, person: str) -> str | None:
        """ "train", "val", "test", or None for people who are left out."""
        if self.named is not None:
            return self.named.get(person)
        place = int.from_bytes(hashlib.sha256(person.encode()).digest()[:8], "big") / 2**64
        if place < self.test_share:
            return "test"
        return "val" if place < self.test_share + self.val_share else "train"


def _read_split_file(path: Path) -> dict[str, str]:
    content = read_json(path, "a split file")
    if not isinstance(content, dict) or not set(content) <= set(SPLITS):
        raise DataError(f"Split file '{path}' must be an object with lists for {', '.join(SPLITS)}.")
    named: dict[str, str] = {}
    for split, people in content.items():
        for person in people:
            if named.setdefault(str(person), split) != split:
                raise DataError(f"Split file '{path}' has {person!r} in both '{named[str(person)]}' and '{split}'.")
    return named


def read_json(path: Path, what: str) -> Any:
    """The file's content, or a DataError that names it."""
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise DataError(f"There is no '{path}' ({what}).") from None
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' ({what}) cannot be read: {error}.") from None


def read_view(path: Path) -> UserImage:
    """The image [H, W, 3]; SkippedGroup if it is missing or damaged."""
    try:
        return read_image(path)
    except ImageError as error:
        raise SkippedGroup(f"image '{path}' cannot be read ({error.reason})") from None


def resized(image: np.ndarray, resolution: int) -> np.ndarray:
    """A square image uint8 [H, H, 3] at another size, [R, R, 3]."""
    if len(image) == resolution:
        return image
    return np.asarray(Image.fromarray(image).resize((resolution, resolution), Image.Resampling.LANCZOS))


def reason_of(error: Exception) -> str:
    """Why something was left out, on one line; other errors than our own begin with their type."""
    worded = isinstance(error, SkippedGroup | DataError)
    return (str(error) if worded else f"{type(error).__name__}: {error}").rstrip(".")


def note_lines(places: Mapping[str, Sequence[str]]) -> list[str]:
    """What the reader had to decide about images, by note the images that have it: one line a note."""
    return [f"{len(names)} images: {note} (the first is {names[0]})" for note, names in places.items()]


def folder_name(text: str) -> str:
    """`text` with everything replaced that does not belong into a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")


def counts(groups: Sequence[ViewGroup]) -> dict[str, int]:
    """How many groups every split has."""
    return {split: sum(group.split == split for group in groups) for split in SPLITS}
