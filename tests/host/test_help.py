"""Every node has a help page, whose tables of inputs and outputs are those of its schema."""

from __future__ import annotations

import re

import pytest

from tools import help_pages
from tools.embedded import pack_nodes

SECTIONS = ("Inputs", "Outputs", *help_pages.SECTIONS)


@pytest.fixture(scope="module")
def nodes(pack):
    """Node id -> the description of the node that the editor gets."""
    return pack_nodes(pack)


@pytest.fixture(scope="module")
def pages(repository):
    return {path.stem: path.read_text(encoding="utf-8") for path in (repository / "web/docs").glob("*.md")}


def section(page: str, title: str) -> str:
    """What stands below a heading of the second level."""
    [text] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return text


def test_one_page_per_node(nodes, pages):
    assert sorted(pages) == sorted(nodes)


def test_tables_are_up_to_date(nodes, pages):
    assert help_pages.pages(nodes) == pages, "run `python -m tools.help_pages`"
    for page in pages.values():
        assert help_pages.TABLE.findall(page) == ["Inputs", "Outputs"]


def test_a_new_node_gets_a_page_to_fill_in(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(help_pages, "FOLDER", tmp_path)
    [page] = help_pages.pages({"DP3D_ViewGrid": nodes["DP3D_ViewGrid"]}).values()
    assert page.startswith("# View Grid\n\nAll views side by side")
    assert "| `gap` | White pixels between the views. |" in section(page, "Inputs")
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == list(SECTIONS)
    (tmp_path / "DP3D_ViewGrid.md").write_text(page.replace("White pixels", "Pixels"), encoding="utf-8")
    assert help_pages.pages({"DP3D_ViewGrid": nodes["DP3D_ViewGrid"]}) == {"DP3D_ViewGrid": page}


def test_pages_are_complete(nodes, pages):
    for node_id, page in pages.items():
        title, about = page.split("\n\n")[:2]
        assert title == f"# {nodes[node_id]['display_name']}" and len(about) > 50, node_id
        assert re.findall(r"^## (.*)$", page, re.MULTILINE) == list(SECTIONS), node_id
        assert all(section(page, title).strip() for title in SECTIONS), node_id


def test_nodes_are_found_by_category_and_other_names(nodes):
    for node_id, node in nodes.items():
        assert node["category"].split("/")[0] == "DiffPortrait3D", node_id
        aliases = [alias.lower() for alias in node["search_aliases"]]
        assert aliases and len(set(aliases)) == len(aliases), node_id
        assert node["display_name"].lower() not in aliases, f"{node_id}: its own name is found anyway"
        assert node["description"].endswith("."), node_id
    names = [node["display_name"] for node in nodes.values()]
    assert len(set(names)) == len(names)
