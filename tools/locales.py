"""Write locales/*/nodeDefs.json from the nodes and list what has to be translated.

    python -m tools.locales

Run it after adding a node or changing a name, a tooltip or a description: new texts are added to every language in
English, and texts whose English has changed are listed. The host serves the files on /i18n and the editor shows them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from diffportrait3d.files import write_text
from tools.embedded import nodes_command
from tools.host import PACK

LANGUAGES = ("zh", "ja")


def locale_file(language: str) -> Path:
    return PACK / "locales" / language / "nodeDefs.json"


def read_locale(language: str) -> dict:
    """A language's texts; empty where there are none yet."""
    try:
        return json.loads(locale_file(language).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def write_locale(language: str, tree: dict) -> None:
    write_text(locale_file(language), json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def english(nodes: dict[str, dict]) -> dict:
    """The texts of nodes as the editor looks them up.

    Args:
        nodes: node id -> description of the node as the host's /object_info gives it
    """
    return {node_id: node_texts(nodes[node_id]) for node_id in sorted(nodes)}


def node_texts(node: dict) -> dict:
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


def update(nodes: dict[str, dict]) -> list[str]:
    """Write every language's file; returns a line for every text that a person has to look at.

    English texts are the nodes' own. Other languages keep their texts and their order follows the English; a new text
    is in English until somebody translates it, and texts that no node has any more are dropped.
    """
    old, new = dict(texts(read_locale("en"))), english(nodes)
    found = [f"changed: {path}: {text}" for path, text in texts(new) if path in old and old[path] != text]
    write_locale("en", new)
    for language in LANGUAGES:
        present = dict(texts(read_locale(language)))
        write_locale(language, _translated(new, present))
        wanted = dict(texts(new))
        found += [f"translate into {language}: {path}: {text}" for path, text in wanted.items() if path not in present]
        found += [f"dropped from {language}: {path}" for path in present if path not in wanted]
    return found


def _translated(tree: dict, present: dict[str, str], prefix: str = "") -> dict:
    """`tree` with the texts that are `present` by their paths in place of the English ones."""
    return {
        key: _translated(value, present, f"{prefix}{key}.")
        if isinstance(value, dict)
        else present.get(prefix + key, value)
        for key, value in tree.items()
    }


if __name__ == "__main__":
    complete = "zh and ja are complete; no English text has changed."
    sys.exit(nodes_command(lambda nodes: "\n".join(update(nodes)) or complete))
