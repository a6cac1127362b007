"""What a data set in the making keeps of every subject: a record, `subject.json`, and the files that it names."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffportrait3d.files import json_object

FILES = ("image", "condition", "depth")
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def is_finished(root: Path, record: Path) -> bool:
    """Whether a subject is there, with all its files.

    Both ends of every file are read: empty, cut off, zeroed or foreign ones are found. If something is damaged or gone,
    a message says so and the record is deleted, so that the subject is made again.
    """
    if not record.is_file():
        return False
    views = (_content(record) or {"views": []})["views"]
    files = [record, *(root / view[kind] for view in views for kind in FILES if kind in view)]
    damaged = next((path for path in files if not _is_whole(path)), None)
    if damaged is None:
        return True
    print(f"'{damaged}' is damaged or gone; '{record.parent.name}' is made again.", file=sys.stderr)
    record.unlink()
    return False


def _is_whole(path: Path) -> bool:
    if path.suffix == ".json":
        return _content(path) is not None
    if not path.is_file():
        return False
    if path.suffix == ".npz":
        return zipfile.is_zipfile(path)  # its directory is at the end
    with path.open("rb") as file:
        start = file.read(len(PNG_START))
        file.seek(-min(len(PNG_END), path.stat().st_size), 2)
        return start == PNG_START and file.read() == PNG_END


def _content(record: Path) -> dict | None:
    content = json_object(record.read_bytes())
    whole = content is not None and "id" in content and isinstance(content.get("views"), list)
    return content if whole and all(isinstance(view, dict) for view in content["views"]) else None


def notes_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(file of the source, what was decided while it was read) of an imported subject."""
    return [(name, note) for name, notes in record.get("notes", {}).items() for note in notes]


def note_lines(notes: Iterable[tuple[str, str]]) -> list[str]:
    """One line a note, from (note, image that has it)."""
    images: dict[str, list[str]] = {}
    for note, image in notes:
        images.setdefault(note, []).append(image)
    return [f"{len(names)} images: {note} (the first is {names[0]})" for note, names in images.items()]
