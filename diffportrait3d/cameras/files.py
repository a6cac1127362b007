"""Cameras from files and to files: EG3D's labels in several forms, and data sets for 3D reconstruction."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import files_with, natural_key, read_text, write_atomically, write_text
from .labels import LABEL_SIZE, validate_labels
from .reconstructions import COLMAP_FILES, Rows, binary_model_in, read_colmap, read_transforms, reconstruction_in

FILE_FORMAT = "diffportrait3d-cameras"
LABEL_SUFFIXES = (".json", ".npy", ".txt")


def write_labels(path: str | os.PathLike, labels: Tensor, names: list[str] | None = None) -> None:
    """Write [V, 25] labels to `.npy` (the array) or `.json`:
    {"format": "diffportrait3d-cameras", "version": 1, "labels": [[25 numbers], ...]}, or, with the images'
    `names`, the form of EG3D's `dataset.json`, {"labels": [[name, [25 numbers]], ...]}."""
    path = Path(path)
    labels = validate_labels(labels)
    if path.suffix == ".npy":
        write_atomically(path, lambda file: np.save(file, labels.numpy()))
    elif path.suffix == ".json":
        rows = labels.tolist()
        if names is None:
            content = {"format": FILE_FORMAT, "version": 1, "labels": rows}
        else:
            content = {"labels": [[name, row] for name, row in zip(names, rows, strict=True)]}
        write_text(path, json.dumps(content, indent=1))
    else:
        raise ValueError(f"{path}: camera labels are written as .json or .npy, not {path.suffix or 'without a suffix'}")


def read_labels(path: str | os.PathLike) -> Tensor:
    """Read [V, 25] labels, V in the order of the file, or in natural order of the names where views have names.

    Args:
        path: whatever `read_rows` reads, or a folder with one such file per view. Lens distortion is logged, left out.

    Raises:
        ValueError: naming the file, the view and the wrong value.
    """
    path = Path(path)
    if path.is_dir() and reconstruction_in(path) is None:
        return _read_label_folder(path)
    rows = read_rows(path)
    if rows.distortion is not None:
        logging.warning("%s: %s; a camera here is a pinhole, so distortion is left out", path, rows.distortion)
    labels, names = rows.labels, rows.names
    if names is not None:
        named = sorted(zip(names, labels, strict=True), key=lambda view: natural_key(view[0]))
        names, labels = [name for name, _ in named], [label for _, label in named]
    try:
        table = label_table(labels, names)
    except ValueError as error:
        raise ValueError(f"{path}: cannot read camera labels: {error}") from None
    return validate_labels(table, str(path), names)


def read_rows(path: str | os.PathLike) -> Rows:
    """The labels of a file in its order, not checked yet, and the views' names.

    Args:
        path: `.npy` [V, 25] (also [25], [V, 1, 25]); `.json` as `write_labels` writes it, as a plain list, as EG3D's
            `dataset.json` (`labels` a list of pairs or an object), or nerfstudio's `transforms.json`; `.txt` with 25
            numbers per line; COLMAP's `images.txt`; or the folder of a data set for reconstruction. Text may begin
            with a byte order mark.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such camera file")
    try:
        if path.is_dir():
            return _read_reconstruction(path)
        if path.name == COLMAP_FILES[1] and (path.parent / COLMAP_FILES[0]).is_file():
            return read_colmap(path.parent)
        if path.suffix.lower() not in _READERS:
            raise ValueError(f"unknown suffix {path.suffix!r}; use {', '.join(LABEL_SUFFIXES)}")
        return _READERS[path.suffix.lower()](path)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot read camera labels: {error}") from error


def label_table(rows: list, names: list[str] | None) -> Tensor:
    """[V, 25] from nested lists of whatever a file held.

    Raises:
        ValueError: naming the view, the place and the value that is no number.
    """
    for view, row in enumerate(rows):
        name = f"view {view}" if names is None else f"view {view} ({names[view]})"
        if not isinstance(row, list) or len(row) != LABEL_SIZE:
            count = f"{len(row)} numbers" if isinstance(row, list) else repr(row)[:60]
            raise ValueError(f"{name} has {count} where a label has {LABEL_SIZE}")
        for place, value in enumerate(row, start=1):
            try:
                float(value)
            except (TypeError, ValueError, OverflowError):
                shown = repr(value)[:60]
                raise ValueError(f"{name} has {shown} in place {place}, which is not a number") from None
    return torch.tensor([[float(value) for value in row] for row in rows])


def without_wrapping(label: Any) -> Any:
    """The list in a list that holds nothing else, e.g. [25 numbers] of [[25 numbers]]."""
    while isinstance(label, list) and len(label) == 1 and isinstance(label[0], list):
        label = label[0]
    return label


def _read_reconstruction(folder: Path) -> Rows:
    found = reconstruction_in(folder)
    if found is None:
        binary = binary_model_in(folder)
        if binary is not None:
            raise ValueError(
                f"{binary} has COLMAP's binary files; make text of them: colmap model_converter --input_path "
                f"{binary} --output_path {binary} --output_type TXT"
            )
        raise ValueError("there is neither transforms.json nor COLMAP's cameras.txt and images.txt in this folder")
    return read_colmap(found) if found.is_dir() else _read_json(found)


def _read_label_folder(folder: Path) -> Tensor:
    files = files_with(folder, LABEL_SUFFIXES)
    if not files:
        if binary_model_in(folder) is not None:
            read_rows(folder)  # says what to do
        raise ValueError(f"{folder}: no camera files ({', '.join(LABEL_SUFFIXES)}) in this folder")
    views = [read_labels(file) for file in files]
    for file, labels in zip(files, views, strict=True):
        if len(labels) != 1:
            raise ValueError(f"{file}: expected one camera per file in a folder, got {len(labels)}")
    return torch.cat(views)


def _read_json(path: Path) -> Rows:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if isinstance(content, dict):
        if "frames" in content:
            return read_transforms(content, path.parent)
        if not content.get("labels"):
            raise ValueError("there are no 'labels' in it")
        content = content["labels"]
    if isinstance(content, dict):
        return _named_rows(list(content.items()))
    if not isinstance(content, list) or not content:
        raise ValueError("expected a list of labels")
    content = without_wrapping(content)
    return _named_rows(content if any(isinstance(row, list | dict) for row in content[:1]) else [content])


def _named_rows(rows: list) -> Rows:
    """Rows of labels, or of pairs of name and label; a name that is null or empty is none."""
    pairs = [(row[0], row[1]) if _is_pair(row) else (None, row) for row in rows]
    labels = [without_wrapping(label) for _, label in pairs]
    names = [None if name in (None, "") else str(name) for name, _ in pairs]
    if not any(names):
        return Rows(labels)
    if None in names:
        nameless = names.index(None)
        raise ValueError(f"view {nameless} has no name, others have; name every view, or none, as names say the order")
    return Rows(labels, [name for name in names if name is not None])


def _is_pair(row: Any) -> bool:
    """Name and label, as EG3D writes them; the name may be missing."""
    return isinstance(row, list | tuple) and len(row) == 2 and not isinstance(row[0], list | dict)


def _read_npy(path: Path) -> Rows:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays; save one of them by numpy.save")
    squeezed = np.squeeze(array)
    if squeezed.ndim not in (1, 2):
        raise ValueError(f"expected [V, {LABEL_SIZE}] numbers, got shape {list(array.shape)}")
    return Rows(np.atleast_2d(squeezed).tolist())


def _read_txt(path: Path) -> Rows:
    lines = (line.replace(",", " ").split() for line in read_text(path).splitlines())
    return Rows([words for words in lines if words])


_READERS = {".json": _read_json, ".npy": _read_npy, ".txt": _read_txt}
