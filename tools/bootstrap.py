"""Set up everything `make` needs: `.venv/`, the pinned packages, this project, the ComfyUI host.

Run by any Python >= 3.11 with nothing installed: `python tools/bootstrap.py`. A stamp in `.venv/` remembers
what was installed, so that a second run only looks.

Environment:
    TORCH_SPEC    what to install for torch, e.g. "torch==2.13.0+cu130"; default: the pinned version
    VENV          where to install; default: .venv
    COMFYUI_PATH  an installed ComfyUI to use instead of the pinned one (see tools/host.py)
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

from host import PACK, ToolError, exit_status, installed_host, obtain_host

VENV = Path(os.environ.get("VENV") or PACK / ".venv")
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / ".setup-stamp"
TORCH_SPEC = os.environ.get("TORCH_SPEC") or "torch==2.13.0"
REQUIREMENTS = [PACK / "tools/requirements-host.txt", PACK / "tools/requirements-dev.txt"]
CLONE_PACKAGES = ("training", "evaluation", "tools")  # not installed: too general a name for anybody's Python


def fingerprint(files: list[Path]) -> str:
    """Hash of everything that decides what is in the venv."""
    digest = hashlib.sha256()
    digest.update(repr((TORCH_SPEC, sys.version_info[:2], str(PACK))).encode())
    for path in [*files, PACK / "pyproject.toml", Path(__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(step: str, *command: str | Path) -> None:
    print(f"{step} ...", flush=True)
    start = time.monotonic()
    if subprocess.run([str(part) for part in command]).returncode != 0:
        raise ToolError(f"{step} failed (see above). Check the network and pip's settings, then try again.")
    print(f"    {time.monotonic() - start:.0f} s", flush=True)


def pip(step: str, *arguments: str | Path) -> None:
    # --no-compile: compiling 1.9 GB of packages takes longer than compiling on demand what is used of them.
    options = ("-q", "--disable-pip-version-check", "--no-compile")
    run(step, VENV_PYTHON, "-m", "pip", "install", *options, *arguments)


def link_clone_packages() -> None:
    """Make the clone's own packages importable in `.venv` from any folder.

    By links in a folder of their own: with the repository's root on sys.path, our nodes/ would hide ComfyUI's nodes.py.
    """
    links = VENV / "clone"
    links.mkdir(exist_ok=True)
    for name in CLONE_PACKAGES:
        link = links / name
        link.unlink(missing_ok=True)
        link.symlink_to(PACK / name, target_is_directory=True)
    command = [VENV_PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    # The second line runs whenever this Python starts: torchvision beside a CPU build of torch, see cpu_wheels.
    lines = f"{links}\nimport tools.cpu_wheels; tools.cpu_wheels.install()\n"
    Path(packages, "clone.pth").write_text(lines, encoding="utf-8")


def setup() -> Path:
    """Bring `.venv/` and the host up to date; returns the host's folder."""
    if sys.version_info < (3, 11):
        raise ToolError(
            f"Python {sys.version.split()[0]} is too old for the pinned packages: use 3.11 or newer, e.g."
            " `make PYTHON=python3.11 setup`."
        )
    host, files = installed_host(), REQUIREMENTS
    if host and (host / "requirements.txt").exists():  # a user's own ComfyUI: its packages instead of our pins for it
        files = [host / "requirements.txt", REQUIREMENTS[1]]
    wanted = fingerprint(files)
    if not VENV_PYTHON.exists():
        run("Creating .venv", sys.executable, "-m", "venv", VENV)
    if not STAMP.exists() or STAMP.read_text(encoding="utf-8") != wanted:
        # One call, so that torch is chosen together with what needs it and is not replaced afterwards.
        listed = [part for path in files for part in ("-r", path)]
        step = f"Installing {TORCH_SPEC} and the packages of the host (once, about a minute)"
        pip(step, *TORCH_SPEC.split(), *listed)
        pip("Installing this project (editable)", "--no-deps", "--no-build-isolation", "-e", PACK)
        link_clone_packages()
        part = STAMP.with_suffix(".part")
        part.write_text(wanted, encoding="utf-8")
        os.replace(part, STAMP)
    return obtain_host()


if __name__ == "__main__":
    sys.exit(exit_status(setup))
