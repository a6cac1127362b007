"""README stays one page, and a change of the usual kinds a handful of files."""

from __future__ import annotations

import re

import pytest


def test_readme_is_one_page(repository):
    assert len((repository / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize(("recipe", "most"), [("node", 6), ("network", 5), ("solver", 6), ("data reader", 4)])
def test_recipes_are_short_and_name_what_is_there(repository, recipe, most):
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(f"### A {recipe}\n")[2]
    rows = [line.split("|")[1] for line in text.partition("### ")[0].splitlines() if line.startswith("| `")]
    files = [file for row in rows for file in re.findall(r"`([^`]+)`", row.split(" or ")[0])]
    assert 0 < len(files) <= most
    for file in files:
        assert any(repository.glob(re.sub(r"<\w+>", "*", file))), file
