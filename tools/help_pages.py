"""Write the tables of the help pages, web/docs/NODE.md, from the nodes' schemas.

    python -m tools.help_pages

Run it after adding a node or changing an input, an output or a tooltip. The sections Inputs and Outputs hold only the
tables, the rest of a page is written by hand; a node without a page gets one to fill in.
"""

from __future__ import annotations

import re
import sys

from diffportrait3d.files import write_text
from tools.embedded import nodes_command
from tools.host import PACK
from tools.locales import node_texts

FOLDER = PACK / "web/docs"
SECTIONS = ("When to change something", "Around it", "Errors and ways out")  # written by hand, below the tables
TABLE = re.compile(r"^## (Inputs|Outputs)\n\n.*?(?=\n\n## )", re.DOTALL | re.MULTILINE)


def section(title: str, node: dict) -> str:
    """The section "Inputs" or "Outputs" of a node's page.

    Args:
        node: description of the node as the host's /object_info gives it.
    """
    texts = node_texts(node)[title.lower()].values()
    rows = [f"| `{each['name']}` | {each['tooltip']} |" for each in texts]
    lines = [f"| {title[:-1]} | What it is |", "|---|---|", *rows]
    return "\n".join([f"## {title}", "", *lines])


def new_page(node: dict) -> str:
    tables = [section(title, node) for title in ("Inputs", "Outputs")]
    head = [f"# {node['display_name']}", node["description"]]
    return "\n\n".join([*head, *tables, *(f"## {title}" for title in SECTIONS)]) + "\n"


def pages(nodes: dict[str, dict]) -> dict[str, str]:
    """Node id -> its page with tables that are up to date."""
    made = {}
    for node_id, node in nodes.items():
        path = FOLDER / f"{node_id}.md"
        page = path.read_text(encoding="utf-8") if path.exists() else new_page(node)
        made[node_id] = TABLE.sub(lambda match, node=node: section(match[1], node), page)
    return made


def update(nodes: dict[str, dict]) -> str:
    made = pages(nodes)
    for node_id, page in made.items():
        write_text(FOLDER / f"{node_id}.md", page)
    return f"{len(made)} pages in {FOLDER.relative_to(PACK)} are up to date."


if __name__ == "__main__":
    sys.exit(nodes_command(update))
