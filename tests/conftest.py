"""Checks that hold for the whole suite, before any test is collected."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # side by side: each worker and its servers keep to their share of the cores
        workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    # `python -m pytest` puts the working directory on sys.path, where nodes/ would hide ComfyUI's nodes.py.
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
    for name in ("diffportrait3d", "tools"):
        spec = importlib.util.find_spec(name)
        if spec is None or Path(spec.origin).resolve().parent != ROOT / name:
            found = "nowhere" if spec is None else spec.origin
            raise pytest.UsageError(f"`{name}` is imported from {found}, not from {ROOT}: run `make setup`"
                                    " and use .venv/bin/pytest.")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root folder."""
    return ROOT
