"""What a data set in the making keeps of every subject: a record, `subject.json`, and the files that it names."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

FILES = ("image", "condition", "depth")
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def is_finished(root: Path, record: Path) -> bool:
    """Whether a subject is there, with all its files.

    Files are looked for and looked at from both ends: empty, cut off, zeroed or foreign ones are found. If something is
    damaged or gone, it is printed and the record is deleted, so that the subject is made again.
    """
    if not record.is_file():
        return False
    damaged = next((path for path in (record, *_named_files(root, record)) if not _is_whole(path)), None)
    if damaged is None:
        return True
    print(f"'{damaged}' is damaged or gone; '{record.parent.name}' is made again.", file=sys.stderr)
    record.unlink()
    return False


def _named_files(root: Path, record: Path) -> list[Path]:
    views = (_content(record) or {"views": []})["views"]
    return [root / view[kind] for view in views for kind in FILES if kind in view]


def _is_whole(path: Path) -> bool:
    if path.suffix == ".json":
        return _content(path) is not None
    if path.suffix == ".npz":
        return path.is_file() and zipfile.is_zipfile(path)  # its directory is at the end
    return path.is_file() and _is_whole_png(path)


def _is_whole_png(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(len(PNG_START))
        file.seek(-min(len(PNG_END), path.stat().st_size), 2)
        return start == PNG_START and file.read() == PNG_END


def _content(record: Path) -> dict | None:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or no text at all
        return None
    whole = isinstance(content, dict) and "id" in content and isinstance(content.get("views"), list)
    return content if whole and all(isinstance(view, dict) for view in content["views"]) else None
