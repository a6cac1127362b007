"""Files: order, and writing them completely or not at all.

Every function that writes raises `WriteError` where the disk is full or the place cannot be written to, and leaves what
was there before.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

FULL = {
    errno.ENOSPC: "the disk is full",
    getattr(errno, "EDQUOT", errno.ENOSPC): "the disk quota is used up",
    errno.EFBIG: "it is larger than files may be here",
}


class WriteError(OSError):
    """A file could not be written; nothing of it was left behind. The message names it and the way out."""


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key that orders "view2" before "view10", whatever the case of the letters."""
    parts = re.findall(r"\d+|\D+", name.lower())
    return [(0, int(part)) if part[0].isdecimal() else (1, part) for part in parts]


def files_with(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files in `folder` with one of these suffixes (lower case, with the dot), none hidden, in natural order."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file()]
    return sorted((path for path in found if path.name[0] != "."), key=lambda path: natural_key(path.name))


def read_text(path: Path) -> str:
    """A text file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        ValueError: it is none.
    """
    data = path.read_bytes()
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError:
        raise ValueError("it is not a text file in UTF-8 (or UTF-16 or UTF-32)") from None


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """The object that a text in JSON is; None if it is damaged, or anything else."""
    try:
        content = json.loads(text)
    except ValueError:  # not JSON, or no text at all
        return None
    return content if isinstance(content, dict) else None


def folders_below(root: str | os.PathLike, enter: Callable[[str], bool]) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for `root`, which is "", and for everything below it; folders are named relative to
    `root`, with "/". Links are followed, but a folder is not entered again below itself, so that a link to a folder
    above ends there. What cannot be opened, broken links among it, is left out.

    Args:
        enter: whether a folder of this name is looked into.
    """
    waiting: list[tuple[str, frozenset]] = [("", frozenset())]  # a folder and the real folders above it
    while waiting:
        folder, above = waiting.pop()
        path = os.path.join(root, folder)
        try:
            found, entries = os.stat(path), list(os.scandir(path))
        except OSError:
            continue
        here = (found.st_dev, found.st_ino)
        if here in above:
            continue
        yield folder, [entry.name for entry in entries if os.path.isfile(entry.path)]
        waiting += [
            (f"{folder}/{entry.name}".lstrip("/"), above | {here})
            for entry in entries
            if os.path.isdir(entry.path) and enter(entry.name)
        ]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes to `path`: the system's errors become a `WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise _write_error(path, error) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Call `write` with a file that takes the place of `path` only when it is complete.

    Args:
        durable: wait until the bytes are on the disk, so that a power cut leaves the old file or the new one. To be
            switched off for files of which there are thousands and which can be made again.
    """
    write_together({path: write}, durable)


def write_together(files: Mapping[Path, Callable[[BinaryIO], object]], durable: bool = True) -> None:
    """The same for files that belong together: all of them are complete before the first one takes its place."""
    try:
        for path, write in files.items():
            _prepare(path, write, durable)
        for path in files:
            with writing(path):
                os.replace(temporary_name(path), path)
    finally:
        for path in files:
            with contextlib.suppress(OSError):
                temporary_name(path).unlink(missing_ok=True)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """The same for a text, in UTF-8 with the line ends that it has."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")), durable)


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Call `fill` with an empty folder that becomes `path`, which must not exist, when it is complete."""
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            fill(temporary)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to the end of a text file: all of it, or nothing."""
    rest = memoryview(f"{line}\n".encode())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise


def file_hash(path: Path) -> str:
    """sha256 of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def temporary_name(path: Path) -> Path:
    """Where this process prepares `path`: hidden, beside it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


class _Output(io.BufferedWriter):
    """A file that remembers an error of writing, of which some libraries (torch.save) make one of their own.

    It denies its file number, by which others (numpy, Pillow) write past it.
    """

    failure: OSError | None = None

    def write(self, data) -> int:
        return self._remember(super().write, data)

    def flush(self) -> None:
        self._remember(super().flush)

    def seek(self, *where: int) -> int:
        return self._remember(super().seek, *where)

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")

    def _remember(self, call: Callable, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            self.failure = error
            raise


def _prepare(path: Path, write: Callable[[BinaryIO], object], durable: bool) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = io.FileIO(temporary_name(path), "w")
    output = _Output(raw)
    with contextlib.closing(raw):  # what is left of a file that failed is not flushed once more
        try:
            write(output)
        except Exception as error:
            if output.failure is None:
                raise  # it is about what was to be written
            raise _write_error(path, output.failure) from error
        with writing(path):
            output.flush()
            if durable:
                os.fsync(raw.fileno())


def _write_error(path: Path, error: OSError) -> WriteError:
    reason = FULL.get(error.errno)
    way_out = "make room, then run it again" if reason else "choose another place, or make this one writable"
    return WriteError(f"'{path}' cannot be written: {reason or error.strerror or error}; {way_out}.")
