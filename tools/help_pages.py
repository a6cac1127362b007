"""Write the tables of the help pages, web/docs/NODE.md, from the nodes' schemas.

    python -m tools.help_pages

Run it after adding a node or changing an input, an output or a tooltip. Tables are between marks, the rest of a page is
written by hand; a node without a page gets one to fill in.
"""

from __future__ import annotations

import re
import sys

from diffportrait3d.files import write_text
from tools.embedded import nodes_command
from tools.host import PACK

FOLDER = PACK / "web/docs"
SECTIONS = ("When to change something", "Around it", "Errors and ways out")  # written by hand, below the tables
TABLE = re.compile(r"<!-- (inputs|outputs): python -m tools\.help_pages -->\n.*?<!-- end -->", re.DOTALL)


def table(part: str, node: dict) -> str:
    """The table of a node's "inputs" or "outputs", with its marks.

    Args:
        node: description of the node as the host's /object_info gives it.
    """
    if part == "inputs":
        groups = [node["input"].get(group, {}) for group in ("required", "optional")]
        rows = [(name, spec[1].get("tooltip", "")) for group in groups for name, spec in group.items()]
    else:
        rows = list(zip(node["output_name"], node["output_tooltips"], strict=True))
    head = f"| {part[:-1].capitalize()} | What it is |\n|---|---|"
    lines = [head, *(f"| `{name}` | {text} |" for name, text in rows)]
    return "\n".join([f"<!-- {part}: python -m tools.help_pages -->", "", *lines, "", "<!-- end -->"])


def new_page(node: dict) -> str:
    tables = [f"## {part.capitalize()}\n\n{table(part, node)}" for part in ("inputs", "outputs")]
    sections = [f"# {node['display_name']}\n\n{node['description']}", *tables, *(f"## {title}" for title in SECTIONS)]
    return "\n\n".join(sections) + "\n"


def pages(nodes: dict[str, dict]) -> dict[str, str]:
    """Node id -> its page with tables that are up to date."""
    made = {}
    for node_id, node in nodes.items():
        path = FOLDER / f"{node_id}.md"
        page = path.read_text(encoding="utf-8") if path.exists() else new_page(node)
        made[node_id] = TABLE.sub(lambda match, node=node: table(match[1], node), page)
    return made


def update(nodes: dict[str, dict]) -> str:
    made = pages(nodes)
    for node_id, page in made.items():
        write_text(FOLDER / f"{node_id}.md", page)
    return f"{len(made)} pages in {FOLDER.relative_to(PACK)} are up to date."


if __name__ == "__main__":
    sys.exit(nodes_command(update))
