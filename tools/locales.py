"""Write locales/en/nodeDefs.json from the nodes and say what the other languages lack.

    python -m tools.locales

Run it after changing a name, a tooltip or a description; it lists the texts whose English has changed, so that zh and
ja can follow. The host serves the files on /i18n and the editor shows them.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tools.frontend import write_json
from tools.host import PACK, HostError
from tools.server import Server, ServerError

LANGUAGES = ("zh", "ja")
OWN_MODULES = "custom_nodes."  # the server of tools.server loads this pack alone


def locale_file(language: str) -> Path:
    return PACK / "locales" / language / "nodeDefs.json"


def read_locale(language: str) -> dict:
    """A language's texts; empty where there are none yet."""
    try:
        return json.loads(locale_file(language).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def english(nodes: dict[str, dict]) -> dict:
    """The texts of nodes as the editor looks them up.

    Args:
        nodes: node id -> description of the node as the host's /object_info gives it
    """
    return {node_id: _node_texts(nodes[node_id]) for node_id in sorted(nodes)}


def _node_texts(node: dict) -> dict:
    groups = [node["input"].get(group, {}) for group in ("required", "optional")]
    inputs = {name: (spec[1] if len(spec) > 1 else {}) for group in groups for name, spec in group.items()}
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {name: {"name": name, "tooltip": options.get("tooltip", "")} for name, options in inputs.items()},
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)},
    }


def texts(tree: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of every text, e.g. ("DP3D_ViewGrid.inputs.gap.tooltip", "...")."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from texts(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def own_nodes(server: Server) -> dict[str, dict]:
    """This pack's nodes from the server's /object_info."""
    with urllib.request.urlopen(f"{server.url}/object_info") as response:
        nodes = json.load(response)
    return {node_id: node for node_id, node in nodes.items() if node["python_module"].startswith(OWN_MODULES)}


def update(nodes: dict[str, dict]) -> list[str]:
    """Write the English texts; returns a sentence for every text that a person has to look at."""
    old, new = dict(texts(read_locale("en"))), english(nodes)
    write_json(locale_file("en"), new)
    wanted = dict(texts(new))
    found = [f"changed: {path}: {text}" for path, text in wanted.items() if path in old and old[path] != text]
    for language in LANGUAGES:
        present = dict(texts(read_locale(language)))
        found += [f"{language} lacks {path}: {text}" for path, text in wanted.items() if path not in present]
        found += [f"{language} has {path}, which no node has" for path in present if path not in wanted]
    return found


def main() -> int:
    try:
        with Server(cpu=True) as server:
            found = update(own_nodes(server))
    except (HostError, ServerError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print("\n".join(found) or "zh and ja are complete; no English text has changed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
