"""Files of the user's own: found below the host's input and output folders, written below its output folder."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from ..diffportrait3d.cameras.files import LABEL_SUFFIXES
from ..diffportrait3d.files import files_with, folders_below, natural_key
from ..diffportrait3d.images import NoteLog, read_image
from .images import resize_images

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
OUTPUT = " [output]"  # the host's mark for names that lie below its output folder
_LISTED_LABELS = (".json", ".npy")


def picture_folders() -> list[str]:
    """Folders with pictures in them, below the host's input folder and (marked) its output folder."""
    return _names(lambda folder, files: [folder] if _any_with(files, PICTURE_SUFFIXES) else [])


def label_sources() -> list[str]:
    """Camera files, and folders with one file per view, below the host's input and (marked) output folder."""

    def sources(folder: str, files: list[str]) -> list[str]:
        single = [f"{folder}/{file}" if folder else file for file in files if _any_with([file], _LISTED_LABELS)]
        return single + ([folder] if sum(_any_with([file], LABEL_SUFFIXES) for file in files) > 1 else [])

    return _names(sources)


def user_path(name: str) -> Path:
    """The file behind a name that one of the host's own nodes holds.

    Raises:
        ValueError: it has gone, or the name leads out of the host's folders.
    """
    return _existing(Path(folder_paths.get_annotated_filepath(name)))


def listed_path(name: str) -> Path:
    """The file or folder behind a name from one of the lists above, by links that lead out of the host's folders, too
    (the host's own function refuses what lies behind those).

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


def check_name(name: str | None, names: list[str], what: str) -> bool | str:
    """For a node's `validate_inputs`: True, or one sentence for a name that is not among `names`. None, a name that
    comes by a link, passes: `in_range` asks again when the node runs."""
    if name is None or name in names:
        return True
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"
    return (
        f"there is no {what} {name!r} (found: {found}); put it below {folder_paths.get_input_directory()} and press R"
    )


def fingerprint(name: str | None, names: list[str]) -> str:
    """Changes when the file, or any file in the folder, does. None, a name that comes by a link and is not known yet,
    stands for all of `names`."""
    paths = map(listed_path, names if name is None else [name])
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
    return "|".join(f"{file}:{file.stat().st_mtime_ns}:{file.stat().st_size}" for file in files)


def load_pictures(folder: Path, width: int, height: int) -> Tensor:
    """Every picture in `folder`, in natural order of the names: IMAGE [V, height, width, 3] in [0, 1].

    Pictures of another size are cropped around their centre to the aspect, then resized. What the reader had to decide
    (transparency, several frames) is logged.

    Raises:
        ValueError: naming the folder without pictures, or the file that is not one.
    """
    files = files_with(folder, PICTURE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: no pictures ({', '.join(PICTURE_SUFFIXES)}) in this folder")
    report = NoteLog()
    return torch.cat([resize_images(load_picture(file, report), height, width) for file in files])


def load_picture(path: Path, report: NoteLog | None = None) -> Tensor:
    """IMAGE [1, H, W, 3] in [0, 1], as `read_image` reads it; `report` logs what was decided about the file.

    Raises:
        ValueError: naming the file that is no picture.
    """
    image = read_image(path)
    if report is not None:
        report(path, image)
    return torch.from_numpy(image.as_floats())[None]


def new_output(prefix: str, images: Tensor | None, suffix: str = "") -> Path:
    """A file or folder below the host's output folder that does not exist yet: prefix, a number, suffix.

    images: IMAGE [V, H, W, C] whose size the host writes in place of %width% and %height%. One file or folder is for
    the whole batch, so %batch_num% is the number of its first picture, 0.

    Raises:
        ValueError: the prefix is empty, or names a size where there are no images. The host itself refuses one that
            leads out of its output folder.
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
    output = folder_paths.get_output_directory()
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, output, width, height)
    return Path(folder) / f"{name}_{counter:05}{suffix}"


def _names(choose) -> list[str]:
    """`choose(folder relative to the root, file names in it)` over the input folder, then the output folder."""
    names = []
    for root, mark in ((folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), OUTPUT)):
        found = []
        for folder, files in folders_below(root, enter=lambda name: name[0] != "."):
            found += choose(folder, files)
        names += [name + mark for name in sorted(filter(None, found), key=natural_key)]
    return names


def _any_with(files: list[str], suffixes: tuple[str, ...]) -> bool:
    return any(file.lower().endswith(suffixes) and file[0] != "." for file in files)
