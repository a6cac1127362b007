"""README stays one page."""

from __future__ import annotations


def test_readme_is_one_page(repository):
    assert len((repository / "README.md").read_text(encoding="utf-8").split()) <= 900
