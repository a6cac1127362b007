"""Imports run one way between the rooms, and nowhere in a circle; the rules are in tests/imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def lint(rules, search_path):
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    command += ["--config", rules, "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(search_path), "COLUMNS": "120"}
    return subprocess.run(command, cwd=search_path, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("rules", ["clone", "pack"])
def test_imports_follow_the_rules(repository, tmp_path, rules):
    folder = repository
    if rules == "pack":  # the pack's relative imports have meaning only below a package, as ComfyUI loads it
        (tmp_path / "pack").symlink_to(repository, target_is_directory=True)
        folder = tmp_path
    result = lint(repository / "tests/imports" / f"{rules}.toml", folder)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_wrong_import_is_found(repository, tmp_path):
    """The rules read relative imports: a hook that imports a node is found."""
    for room, code in {
        "nodes": "",
        "patches": "from ..nodes import something\n",
        "host": "",
        "diffportrait3d": "",
    }.items():
        (tmp_path / "pack" / room).mkdir(parents=True)
        (tmp_path / "pack" / room / "__init__.py").write_text("")
        (tmp_path / "pack" / room / "module.py").write_text(code)
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "nodes" / "something.py").write_text("")
    result = lint(repository / "tests/imports/pack.toml", tmp_path)
    assert result.returncode != 0 and "pack.patches.module -> pack.nodes.something" in result.stdout
