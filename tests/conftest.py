"""Checks that hold for the whole suite, before any test is collected."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# First: pytest would make packages of these names out of tests/training and tests/evaluation.
for package in ("diffportrait3d", "training", "evaluation", "tools"):
    importlib.import_module(package)


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # side by side: each worker and its servers keep to their share of the cores
        workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    # `python -m pytest` puts the working directory on sys.path, where nodes/ would hide ComfyUI's nodes.py.
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
    for name in ("diffportrait3d", "training", "evaluation", "tools"):
        spec = importlib.util.find_spec(name)
        if spec is None or Path(spec.origin).resolve().parent != ROOT / name:
            found = "nowhere" if spec is None else spec.origin
            raise pytest.UsageError(
                f"`{name}` is imported from {found}, not from {ROOT}: run `make setup` and use .venv/bin/pytest."
            )


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture
def room():
    """`with room(bytes):` no file may become larger, as on a disk with no more room than that."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def on_small_disk(tmp_path):
    """on_small_disk(kilobytes, script, **environment): a shell script for which $DISK is the folder of a disk of that
    size, which ends with it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(kilobytes: int, script: str, **environment: str) -> subprocess.CompletedProcess:
        mount = f'mount -t tmpfs -o size={kilobytes}k tmpfs "$DISK"'
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        setting = {**os.environ, "DISK": str(disk), "PYTHONDONTWRITEBYTECODE": "1", **environment}
        options = {"env": setting, "cwd": ROOT, "capture_output": True, "text": True}
        if shutil.which("unshare") is None or subprocess.run([*command, mount], **options).returncode:
            pytest.skip("no disk may be mounted here")
        return subprocess.run([*command, f"{mount} && {{ {script}; }}"], **options, timeout=600)

    return run
