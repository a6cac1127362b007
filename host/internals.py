"""Whether this host is the pack's: not too old, and with all of its internals that `internals.csv` lists. Nothing is
imported here that an older host may lack.

ComfyUI promises to keep `comfy_api`, nothing below `comfy`. A release that moves one of these names is noticed here,
with the name, the files of ours that need it and the way on, instead of in the middle of somebody's run.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

OLDEST = "0.30.0"  # ComfyUI


def check_host_version() -> None:
    """Raises ImportError, which the host shows beside the pack's name, in a ComfyUI before `OLDEST`."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        version = "older"
    if _numbers(version) < _numbers(OLDEST):
        raise ImportError(f"DiffPortrait3D needs ComfyUI {OLDEST} or newer, and this one is {version}; update ComfyUI.")


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 30, 0) for 0.30.0 and for 0.30.0-3-gabc; (0,) for what is no version."""
    parts = version.split("-")[0].split(".")
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


class Internal(NamedTuple):
    """A row of the list.

    name: an attribute (`Class.method`), or a text in the module's code: an attribute of instances (`self.name`), the
        key of an option (`"key"`), or a mark by which another node is known (`class Name`).
    arguments: those that we give by name, separated by spaces.
    since: the first ComfyUI that has it, with the arguments.
    required: "no" where the pack runs without it, only less well.
    """

    module: str
    name: str
    arguments: str
    since: str
    used_in: str
    required: str
    instead: str


def internals() -> list[Internal]:
    with open(Path(__file__).with_name("internals.csv"), encoding="utf-8", newline="") as file:
        return [Internal(*row) for row in list(csv.reader(file))[1:]]


def check_internals() -> None:
    """Raises ImportError, which the host shows beside the pack's name, unless this host has all that is required; for
    the rest it logs a warning."""
    lacking: dict[str, list[str]] = {"yes": [], "no": []}
    for internal in internals():
        if problem := _problem(internal):
            lacking[internal.required].append(f"{problem} (for {internal.used_in}; instead: {internal.instead})")
    message = "this ComfyUI has changed what DiffPortrait3D uses: {}. Update DiffPortrait3D{}."
    if lacking["no"]:
        logging.warning(message.format("; ".join(lacking["no"]), ""))
    if lacking["yes"]:
        way_out = ", or use a ComfyUI that its docs/hosts.md lists"
        raise ImportError(message.format("; ".join(lacking["yes"]), way_out))


def _problem(internal: Internal) -> str | None:
    """What this host lacks of a row, or None."""
    module, name, arguments = internal.module, internal.name, internal.arguments.split()
    if name.startswith("self.") or not name.replace(".", "").isidentifier():
        return None if name in _source(module) else f"{module} has no {name}"
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return f"{module} has no {name}"
    accepted = inspect.signature(found).parameters if arguments else {}
    unknown = [argument for argument in arguments if argument not in accepted]
    return f"{name} of {module} takes no {', '.join(unknown)}" if unknown else None


def _source(module: str) -> str:
    """The module's code, without importing it: the host loads its extra nodes under other names."""
    try:
        spec = find_spec(module)
    except ImportError:
        return ""
    return Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
