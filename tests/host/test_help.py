"""Every node has a help page that tells about every input and output it has."""

from __future__ import annotations

import re

import pytest

SECTIONS = ("Inputs", "Outputs", "When to change something", "Around it", "Errors and ways out")


@pytest.fixture(scope="module")
def nodes(pack):
    """Node id -> the description of the node that the editor gets."""
    found = [node for family in pack.nodes.FAMILIES for node in family.NODES]
    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in found}


@pytest.fixture(scope="module")
def pages(repository):
    return {path.stem: path.read_text(encoding="utf-8") for path in (repository / "web/docs").glob("*.md")}


def section(page: str, title: str) -> str:
    """What stands below a heading of the second level."""
    [text] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return text


def rows(page: str, title: str) -> list[str]:
    """The names in the first column of a section's table."""
    return re.findall(r"^\| `([^`]+)` \|", section(page, title), re.MULTILINE)


def test_one_page_per_node(nodes, pages):
    assert sorted(pages) == sorted(nodes)


def test_pages_name_what_the_nodes_have(nodes, pages):
    for node_id, node in nodes.items():
        names = [name for group in ("required", "optional") for name in node["input"].get(group, {})]
        assert sorted(rows(pages[node_id], "Inputs")) == sorted(names), node_id
        assert rows(pages[node_id], "Outputs") == list(node["output_name"]), node_id


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
