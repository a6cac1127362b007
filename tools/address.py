"""Write the repository's address into the files that name it: pyproject.toml, for the registry, and README.md.

    python -m tools.address https://github.com/OWNER/ComfyUI-DiffPortrait3D

A second call replaces the first one's. The registry's pictures are the files in docs/brand, on the branch main.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from diffportrait3d.files import write_text
from tools.host import PACK, ToolError, exit_status

GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git|/)?")
IN_README = re.compile(r"(git clone --depth 1 )\S+")


def entries(repository: str) -> dict[str, dict[str, str]]:
    """Section of pyproject.toml -> its lines for `repository`, "OWNER/NAME"."""
    address, raw = f"https://github.com/{repository}", f"https://raw.githubusercontent.com/{repository}/main/docs/brand"
    return {
        "project.urls": {
            "Repository": address,
            "Documentation": f"{address}/tree/main/docs",
            '"Bug Tracker"': f"{address}/issues",
        },
        "tool.comfy": {"Icon": f"{raw}/icon.svg", "Banner": f"{raw}/banner.svg"},
    }


def with_address(pyproject: str, repository: str) -> str:
    for section, lines in entries(repository).items():
        for name in lines:
            pyproject = re.sub(rf"^{re.escape(name)} = .*\n", "", pyproject, flags=re.MULTILINE)
        new = "".join(f'{name} = "{value}"\n' for name, value in lines.items())
        pyproject = pyproject.replace(f"[{section}]\n", f"[{section}]\n{new}")
    return pyproject


def write_address(address: str, folder: Path = PACK) -> None:
    """Changes both files in `folder`.

    Raises:
        ToolError: not the address of a repository on GitHub, or README.md has no line to clone.
    """
    found = GITHUB.fullmatch(address)
    if found is None:
        raise ToolError(f"{address!r} is not of the form https://github.com/OWNER/NAME, which the registry asks for.")
    readme, pyproject = folder / "README.md", folder / "pyproject.toml"
    text, places = IN_README.subn(rf"\g<1>https://github.com/{found[1]}", readme.read_text(encoding="utf-8"))
    if places != 1:
        raise ToolError(f"{readme} has {places} lines `git clone --depth 1 ADDRESS`, and one is expected.")
    write_text(pyproject, with_address(pyproject.read_text(encoding="utf-8"), found[1]))
    write_text(readme, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.address", description=__doc__.splitlines()[0])
    parser.add_argument("address", help="https://github.com/OWNER/NAME")
    address = parser.parse_args().address
    return exit_status(lambda: write_address(address))


if __name__ == "__main__":
    sys.exit(main())
