"""Files of the user's own: found below the host's input and output folders, written below its output folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from ..diffportrait3d.cameras.export import export_views
from ..diffportrait3d.cameras.files import LABEL_SUFFIXES
from ..diffportrait3d.files import files_with, folders_below, natural_key
from ..diffportrait3d.images import SUFFIXES, NoteLog, UserImage, read_image
from ..diffportrait3d.synthetic_heads.points import head_points
from .images import check_images, check_one_camera_each, resize_images

OUTPUT = " [output]"  # the host's mark for names below its output folder
_LISTED_LABELS = (".json", ".npy")
LONGEST_NAME = 200  # bytes; file systems take 255, with the number and the suffix
FEWEST_POINTS = 4  # a splat takes its size from so many neighbours


class UserFiles:
    """Files or folders of one kind below the host's input folder and (marked) its output folder, as a node lists them.

    Args:
        what: one of them, for errors.
        choose: (folder relative to the root, names of its files) -> the names to list.
    """

    def __init__(self, what: str, choose: Callable[[str, list[str]], list[str]]):
        self.what, self.choose = what, choose

    def names(self) -> list[str]:
        """All of them, in natural order, those of the input folder first."""
        names = []
        for root, mark in ((folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), OUTPUT)):
            found = []
            for folder, files in folders_below(root, enter=lambda name: name[0] != "."):
                found += self.choose(folder, files)
            names += [name + mark for name in sorted(filter(None, found), key=natural_key)]
        return names

    def check(self, name: str | None) -> bool | str:
        """For a node's `validate_inputs`: True, or one sentence for a name that is not listed. None, a name that
        comes by a link, passes: the node asks again when it runs."""
        if name is None or (isinstance(name, str) and self._lists(name)):
            return True
        names = self.names()
        found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"
        return (
            f"there is no {self.what} {name!r} (found: {found}); put it below {folder_paths.get_input_directory()} and "
            "press R"
        )

    def fingerprint(self, name: str | None) -> str:
        """Changes when the file, or any file in the folder, does. None, a name that comes by a link and is not known
        yet, means all names."""
        paths = map(listed_path, self.names() if name is None else [name])
        parts = [sorted(path.iterdir()) if path.is_dir() else [path] for path in paths]
        files = [file for part in parts for file in part if file.is_file()]
        return "|".join(f"{file}:{file.stat().st_mtime_ns}:{file.stat().st_size}" for file in files)

    def _lists(self, name: str) -> bool:
        """Whether `name` is among `names`; looks into its own folder only."""
        output, below = name.endswith(OUTPUT), name.removesuffix(OUTPUT)
        if any(not part or part[0] == "." or Path(part).name != part for part in below.split("/")):
            return False
        path = Path(folder_paths.get_output_directory() if output else folder_paths.get_input_directory(), below)
        folder, inside = (below, path) if path.is_dir() else (below.rpartition("/")[0], path.parent)
        try:
            files = [file.name for file in inside.iterdir() if file.is_file()]
        except OSError:
            return False
        return below in self.choose(folder, files)


def _with_labels(folder: str, files: list[str]) -> list[str]:
    """Single files, and the folder where it has one file per view."""
    single = [f"{folder}/{file}" if folder else file for file in files if _any_with([file], _LISTED_LABELS)]
    return single + ([folder] if sum(_any_with([file], LABEL_SUFFIXES) for file in files) > 1 else [])


def _any_with(files: list[str], suffixes: tuple[str, ...]) -> bool:
    return any(file.lower().endswith(suffixes) and file[0] != "." for file in files)


IMAGE_FOLDERS = UserFiles("image folder", lambda folder, files: [folder] if _any_with(files, SUFFIXES) else [])
CAMERA_FILES = UserFiles("camera file", _with_labels)


def user_path(name: str) -> Path:
    """The file behind a name that one of the host's own nodes holds.

    Raises:
        ValueError: it has gone, or the name leads out of the host's folders.
    """
    return _existing(Path(folder_paths.get_annotated_filepath(name)))


def listed_path(name: str) -> Path:
    """The file or folder behind a listed name, also behind links out of the host's folders, which the host refuses.

    Raises:
        ValueError: it has gone, or the name itself leads out of the host's folders.
    """
    below, root = folder_paths.annotated_filepath(name)
    root = os.path.abspath(root or folder_paths.get_input_directory())
    path = Path(os.path.abspath(os.path.join(root, below)))
    if not path.is_relative_to(root):
        raise ValueError(f"{name!r} leads out of {root}; choose a name from the list.")
    return _existing(path)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} does not exist; put it there and press R, or choose another.")
    return path


def load_images(folder: Path, width: int, height: int) -> Tensor:
    """Every image in `folder`, in natural order of the names: IMAGE [V, height, width, 3] in [0, 1].

    Images of another size are cropped around their centre to the aspect, then resized. What the reader had to decide
    (transparency, several frames) is logged.

    Raises:
        ValueError: naming the folder without images, or the file that is none.
    """
    files = files_with(folder, SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: no images ({', '.join(SUFFIXES)}) in this folder")
    report = NoteLog()
    images = (_as_image(report(file, read_image(file))) for file in files)
    return torch.cat([resize_images(image, height, width) for image in images])


def load_image(path: Path) -> Tensor:
    """IMAGE [1, H, W, 3] in [0, 1], as `read_image` reads it, which raises ValueError, naming the file that is none."""
    return _as_image(read_image(path))


def _as_image(image: UserImage) -> Tensor:
    return torch.from_numpy(image.as_floats())[None]


def new_output(prefix: str, images: Tensor | None, suffix: str = "") -> Path:
    """A file or folder below the host's output folder that does not exist yet: prefix, a number, suffix.

    images: IMAGE [V, H, W, C] whose size the host writes in place of %width% and %height%. One file or folder is for
    the whole batch, so %batch_num% is the number of its first image, 0.

    Raises:
        ValueError: the prefix is empty or too long, leads out of the output folder, or names a size where there are no
            images.
    """
    if not prefix.strip(" /\\"):
        raise ValueError("filename_prefix is empty; give the saved files a name.")
    sized = next((token for token in ("%width%", "%height%") if token in prefix), None)
    if images is None and sized:
        raise ValueError(
            f"filename_prefix {prefix!r} has {sized}, but cameras alone have no size in pixels; connect "
            f"the views to images, or take {sized} out."
        )
    height, width = (0, 0) if images is None else images.shape[1:3]
    prefix = prefix.replace("%batch_num%", "0")
    output = os.path.abspath(folder_paths.get_output_directory())
    if "\0" in prefix or not Path(os.path.abspath(os.path.join(output, prefix))).is_relative_to(output):
        raise ValueError(f"filename_prefix {prefix!r} leads outside the output folder {output}; give a name below it.")
    longest = max(len(os.fsencode(part)) for part in Path(prefix).parts)
    if longest > LONGEST_NAME:
        raise ValueError(f"filename_prefix has a name of {longest} bytes, and at most {LONGEST_NAME} fit; shorten it.")
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, output, width, height)
    return Path(folder) / f"{name}_{counter:05}{suffix}"


def export_dataset(folder: Path, images: Tensor, labels: Tensor, masks: Tensor | None, start_points: int) -> None:
    """Writes IMAGE [V, H, W, 3 or 4], cameras [V, 25] and MASK [V, H, W] to a new folder, and points on a head.

    Raises:
        ValueError: broken or empty images or masks, or counts and sizes that differ.
    """
    check_images(images, "Export Views")
    check_one_camera_each(images, labels, "Export Views")
    if masks is not None:
        check_images(masks, "Export Views", "masks")
        black = (masks.flatten(1).amax(1) <= 0).nonzero().flatten().tolist()
        if black:
            raise ValueError(f"Export Views: the mask of view {black[0]} is empty; white marks what counts, invert it?")
    points = head_points(images.cpu(), labels, start_points) if start_points else None
    if points is not None and len(points.positions) < FEWEST_POINTS:
        logging.warning(
            "Export Views: the cameras see %d of the start points, too few for gsplat to start from; ask for more, or, "
            "if they do not look at a head at (0, 0, 0.2), start from random points.",
            len(points.positions),
        )
    export_views(folder, images, labels, masks, points)
