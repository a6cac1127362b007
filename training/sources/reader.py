"""What a reader of a data set is, and what readers share. `training.import_data.READERS` lists them."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from diffportrait3d.cameras.files import label_table, without_wrapping
from diffportrait3d.cameras.labels import validate_labels
from diffportrait3d.files import read_text
from diffportrait3d.images import ImageError, UserImage, read_image
from diffportrait3d.portraits.warping import OUTSIDE

from ..dataset.images import SPLITS, DataError


class SkippedGroup(DataError):
    """This group cannot be used, the others may be; the message says why."""


class PortraitView(NamedTuple):
    """image: uint8 [R, R, 3]; label: [25]; name: which camera or file of the source it is; notes: what was decided for
    the user while the file was read."""

    image: np.ndarray
    label: Tensor
    name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ViewGroup:
    """Views of one person at one moment: a line of the manifest to be.

    id: unique, usable as a folder's name. person: who it shows; no person is in two splits. place: what the reader
    needs to find the images (plain JSON).
    """

    id: str
    person: str
    split: str
    place: dict[str, Any]


class Reader(ABC):
    """A data set in somebody's own layout.

    Attributes:
        help: what the command line says about it.
        name: of the command, and of the files that an import keeps about this source.
        root: folder of the data set.
        left_out: what `groups` could not plan, and why.
    """

    help: ClassVar[str]

    def __init__(self, name: str, root: Path):
        self.name, self.root = name, root
        self.left_out: dict[str, str] = {}

    @classmethod  # noqa: B027 - a reader may have no options
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Options of its own."""

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> Reader:
        return cls(args.command, args.source)

    def settings(self) -> dict[str, Any]:
        """What decides the images, apart from the files (plain JSON, no paths)."""
        return {}

    @abstractmethod
    def groups(self) -> list[ViewGroup]:
        """What is to be imported; DataError if there is nothing at all."""

    @abstractmethod
    def views(self, group: ViewGroup, resolution: int) -> list[PortraitView]:
        """Read a planned group. Whatever is raised leaves out this group alone."""

    @contextmanager
    def leaving_out(self, what: str) -> Iterator[None]:
        """Around the planning of something that is left out if it cannot be used."""
        try:
            yield
        except DataError as error:
            self.left_out[what] = reason_of(error)

    def square_views(self, names: list[str], labels: Tensor, resolution: int) -> list[PortraitView]:
        """Images of `root` at another size, with their labels [V, 25]."""
        images = [read_square(self.root / name) for name in names]
        return [
            PortraitView(resized(image, resolution), label, name, image.notes)
            for image, label, name in zip(images, labels, names, strict=True)
        ]


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
        position = int.from_bytes(hashlib.sha256(person.encode()).digest()[:8], "big") / 2**64
        if position < self.test_share:
            return "test"
        return "val" if position < self.test_share + self.val_share else "train"


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


class PhotographReader(Reader):
    """Images that come without splits, and perhaps without alignment (see `alignment`).

    Attributes:
        options_class: dataclass of what decides the images, beside the splits; its fields are named like the options.
        landmarks: folder of five points (see `landmarks`).
    """

    options_class: ClassVar[type]

    def __init__(self, name: str, root: Path, splits: Splits, options: Any, landmarks: Path | None = None):
        super().__init__(name, root)
        self.splits, self.options, self.landmarks = splits, options, landmarks

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--landmarks", type=Path, help="folder of five facial points from any detector, see docs/data.md")
        add("--tolerance", type=float, help="disagreement of five points between cameras, in image sizes")
        add("--outside", choices=OUTSIDE, help="what a crop shows where its image has ended")
        add("--split-file", type=Path, help='JSON {"train": [people], "val": [...], "test": [...]} instead of shares')
        add("--test-share", type=float, default=0.2, help="share of people in split test, by their names' hash")
        add("--val-share", type=float, default=0.02, help="share of people in split val")
        defaults = {field.name: field.default for field in fields(cls.options_class) if field.default is not MISSING}
        parser.set_defaults(**defaults)

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> PhotographReader:
        if args.landmarks is not None and not args.landmarks.is_dir():
            raise DataError(f"--landmarks {args.landmarks}: no such folder")
        options = cls.options_class(**{field.name: getattr(args, field.name) for field in fields(cls.options_class)})
        splits = Splits(args.val_share, args.test_share, args.split_file)
        return cls(args.command, args.source, splits, options, args.landmarks)

    def settings(self) -> dict[str, Any]:
        return {**vars(self.options), "splits": self.splits.settings()}


def checked_labels(rows: list[Any], names: list[str], source: str) -> Tensor:
    """Labels [V, 25] of views by these names; SkippedGroup if one is wrong."""
    try:
        return validate_labels(label_table([without_wrapping(row) for row in rows], names), source, names)
    except ValueError as error:
        raise SkippedGroup(f"camera labels: {error}") from None


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


def read_square(path: Path) -> UserImage:
    """The image [H, H, 3]; SkippedGroup if it is missing, damaged or not square."""
    image = read_view(path)
    height, width = image.pixels.shape[:2]
    if height != width:
        raise SkippedGroup(f"image '{path}' is {width}x{height}, not square")
    return image


def resized(image: UserImage, resolution: int) -> np.ndarray:
    """A square image as uint8 [R, R, 3]."""
    pixels = image.as_bytes()
    if len(pixels) == resolution:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((resolution, resolution), Image.Resampling.LANCZOS))


def reason_of(error: Exception) -> str:
    """Why something was left out, on one line; other errors than our own begin with their type."""
    return (str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}").rstrip(".")


def folder_name(text: str) -> str:
    """`text` with everything replaced that does not belong into a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")
