"""What a message or a help page tells people to use is in the pack as the registry serves it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from diffportrait3d.networks import NETWORKS
from diffportrait3d.weights.files import way_to_get

ABSENT = re.compile(
    r"\bmake (demo|miniature|test|setup|ablations|evaluate|golden)\b|Makefile|-m (training|evaluation|tools)\b|"
    r"\b(training|evaluation|tools|tests)(/|\.[a-z_]+\b(?= |`|'|$))"
)


def served(repository: Path, folder: str, pattern: str) -> list[Path]:
    lines = (repository / ".comfyignore").read_text(encoding="utf-8").splitlines()
    dropped = tuple(line for line in lines if line and line[0] != "#")
    files = [path for path in (repository / folder).rglob(pattern) if "__pycache__" not in path.parts]
    return [path for path in files if not path.relative_to(repository).as_posix().startswith(dropped)]


def messages(path: Path) -> list[str]:
    """Strings of a module that may be shown: not its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and node.body
                  and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [node.value for node in strings if id(node) not in docstrings]


@pytest.mark.parametrize("folder", ["nodes", "host", "patches", "diffportrait3d"])
def test_messages_name_nothing_that_is_not_served(repository, folder):
    found = {f"{path.name}: {text}" for path in served(repository, folder, "*.py") for text in messages(path)
             if ABSENT.search(text)}  # fmt: skip
    assert not found


@pytest.mark.parametrize(("folder", "pattern"), [("web/docs", "*.md"), ("locales", "*.json")])
def test_help_pages_name_nothing_that_is_not_served(repository, folder, pattern):
    pages = served(repository, folder, pattern)
    assert pages and not [path for path in pages if ABSENT.search(path.read_text(encoding="utf-8"))]


def test_the_pattern_finds_what_it_is_for():
    for text in ("with `make miniature`", "written by training/", "python -m evaluation.golden", "the Makefile"):
        assert ABSENT.search(text)
    assert not ABSENT.search("after training. Every tool makes one, and make the views")


@pytest.mark.parametrize("kind", [None, *NETWORKS])
def test_ways_to_a_network_exist(repository, kind):
    said = way_to_get(kind)
    assert "weights/miniature" in said and (repository / "weights/miniature").is_dir()
    if "docs/released_weights.md" in said:
        assert served(repository, "docs", "released_weights.md") and served(repository, "diffportrait3d", "convert.py")
    assert ("convert" in said) == (kind in (None, "reference_encoder", "view_controlnet", "view_consistency"))
