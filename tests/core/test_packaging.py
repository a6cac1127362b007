"""What an installation brings: the core alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile

SOURCES = ("diffportrait3d", "training", "evaluation", "tools", "nodes", "patches", "host")


def test_wheel_holds_the_core_alone(repository, tmp_path):
    clone = tmp_path / "clone"  # a build leaves folders behind
    for name in SOURCES:
        shutil.copytree(repository / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"):
        shutil.copy(repository / name, clone)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, clone]
    subprocess.run(command, check=True, cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"diffportrait3d"}
    sources = [*(repository / "diffportrait3d").rglob("*.py"), *(repository / "diffportrait3d").rglob("*.json")]
    assert {path.relative_to(repository).as_posix() for path in sources} <= set(names)
