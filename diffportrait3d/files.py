"""Small things about files that several parts need."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key that orders "view2" before "view10", whatever the case of the letters."""
    parts = re.findall(r"\d+|\D+", name.lower())
    return [(0, int(part)) if part[0].isdecimal() else (1, part) for part in parts]


def files_with(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files in `folder` with one of these suffixes (lower case, with the dot) in natural order. Hidden files
    are left out."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file()]
    return sorted((path for path in found if path.name[0] != "."), key=lambda path: natural_key(path.name))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` with a file that takes the place of `path` only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
