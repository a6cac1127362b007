"""What an installation brings: the core alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile

import pytest
import tomllib

from tools.address import write_address
from tools.host import ToolError

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


def test_address_is_written_everywhere_by_one_command(repository, tmp_path):
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(repository / name, tmp_path)
    before = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))
    for owner in ("first", "second"):
        write_address(f"https://github.com/{owner}/ComfyUI-DiffPortrait3D", tmp_path)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))
    address = "https://github.com/second/ComfyUI-DiffPortrait3D"
    assert project["project"]["urls"] == before["project"]["urls"] | {
        "Repository": address,
        "Documentation": f"{address}/tree/main/docs",
        "Bug Tracker": f"{address}/issues",
    }
    for name in ("Icon", "Banner"):
        path = project["tool"]["comfy"][name].removeprefix(
            "https://raw.githubusercontent.com/second/ComfyUI-DiffPortrait3D/main/"
        )
        assert (repository / path).is_file()
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"git clone --depth 1 {address}  " in readme and "first/" not in str(project)
    with pytest.raises(ToolError, match="'example.org' is not of the form"):
        write_address("example.org", tmp_path)
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(ToolError, match="0 lines `git clone"):
        write_address(address, tmp_path)


def test_registry_and_readme_name_the_same_repository(repository):
    """Until the pack is published neither names any."""
    urls = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    address = urls.get("Repository", "https://github.com/\u2026/ComfyUI-DiffPortrait3D")
    assert f"git clone --depth 1 {address} " in (repository / "README.md").read_text(encoding="utf-8")
