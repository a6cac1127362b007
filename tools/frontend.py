"""Open a workflow in ComfyUI's own frontend: save its editor form, its API form, a screenshot.

    python -m tools.frontend workflows/api/turntable.json --ui workflows/turntable.json --screenshot shot.png --run 600

Every `workflows/*.json` is saved this way, so that it is what the real frontend writes. Needs Node.js and Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from tools.demo import PORTRAIT
from tools.host import PACK, HostError
from tools.server import Server, ServerError

BROWSER_TOOLS = PACK / "tools/browser"
# No tutorial over the canvas, no map in its corner, text at every zoom.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "LiteGraph.Canvas.MinFontSizeForLOD": 0}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class FrontendError(RuntimeError):
    """The browser cannot be run; the message says what is missing."""


def find_browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise FrontendError(f"No browser: none of {', '.join(BROWSERS)} is on PATH; install Chromium.")
    return found


def install_playwright() -> None:
    """Install the driver (no browser) beside shot.mjs, once."""
    if (BROWSER_TOOLS / "node_modules/playwright-core").is_dir():
        return
    if shutil.which("npm") is None:
        raise FrontendError("npm is not on PATH: install Node.js 18 or newer.")
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
    if subprocess.run(command, cwd=BROWSER_TOOLS).returncode != 0:
        raise FrontendError("npm could not install playwright-core (see above).")


def open_workflow(server: Server, workflow: Path, **results: Path | int | None) -> None:
    """Load `workflow` (either form) and write the wanted `results`: ui, api, screenshot; run: seconds to wait.

    Raises:
        FrontendError: no browser, or the frontend refused the workflow (it printed why)
    """
    options = {"url": server.url, "browser": find_browser(), "workflow": str(workflow.resolve())}
    for name, value in results.items():
        if value is not None:
            options[name] = str(value.resolve()) if isinstance(value, Path) else value
    if subprocess.run(["node", str(BROWSER_TOOLS / "shot.mjs"), json.dumps(options)]).returncode != 0:
        raise FrontendError(f"The frontend could not open {workflow} (see above).")


def prepare(server: Server) -> None:
    """Settings that keep dialogs off the canvas, and the default portrait as an input image."""
    settings = server.base_directory / "user/default/comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    if PORTRAIT.is_file():
        (server.base_directory / "input").mkdir(exist_ok=True)
        shutil.copy(PORTRAIT, server.base_directory / "input" / PORTRAIT.name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.frontend", description=__doc__.splitlines()[0])
    parser.add_argument("workflow", type=Path, help="a workflow in API or editor form")
    parser.add_argument("--ui", type=Path, help="save the editor form here")
    parser.add_argument("--api", type=Path, help="save the API form here")
    parser.add_argument("--screenshot", type=Path, help="save a PNG of the canvas here")
    parser.add_argument("--run", type=int, metavar="SECONDS", help="run it first, so that previews show; wait at most")
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--height", type=int, default=900)
    options = vars(parser.parse_args())
    try:
        install_playwright()
        with Server() as server:
            prepare(server)
            open_workflow(server, options.pop("workflow"), **options)
    except (FrontendError, HostError, ServerError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
