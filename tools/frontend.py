"""Save the example workflows and their thumbnails with ComfyUI's own frontend.

    python -m tools.frontend                             # all of workflows/api
    python -m tools.frontend turntable --run 600 --screenshots /tmp/shots

`workflows/api/NAME.json` says what is computed, `workflows/layout/NAME.json` where the nodes stand and what the note
says; `workflows/NAME.json` and its thumbnail are what the frontend makes of them. Needs Chromium.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path

from PIL import Image, ImageOps

from tools.browser import Browser, BrowserError
from tools.demo import PORTRAIT
from tools.host import PACK, PACK_NAME, HostError
from tools.server import Server, ServerError

WORKFLOWS = PACK / "workflows"
SCRIPT = PACK / "tools/frontend.js"
MINIATURE = PACK / "weights/miniature"
START_SECONDS = 180
THUMBNAIL = (640, 360)
# No map in the canvas's corner, text at every zoom, previews while sampling.
SETTINGS = {"Comfy.Minimap.Visible": False, "LiteGraph.Canvas.MinFontSizeForLOD": 0,
            "Comfy.Execution.PreviewMethod": "latent2rgb"}
# Opened by its address: a template of ours in place of the default graph, whose models nobody has.
FIRST = f"?template=turntable&source={PACK_NAME}"
# What people have and this repository has not: inputs that name a file of theirs, and the folder it lies in.
FOLDERS = {"ckpt_name": "checkpoints", "lora_name": "loras", "control_net_name": "controlnet"}
# Address of the picture on the node that shows the view grid.
GRID = "() => window.app.graph.nodes.find((node) => /grid$/i.test(node.title) && node.imgs?.length)?.imgs[0].src"
READY = "() => Boolean(window.app?.extensionManager && window.app?.graph?.nodes.length && window.LiteGraph)"


class FrontendError(RuntimeError):
    """The frontend could not open or run a workflow; the message says why."""


class Frontend(Browser):
    """ComfyUI's editor in a headless browser: `with Frontend(server) as frontend: ...`."""

    def __init__(self, server: Server, **options):
        super().__init__(f"{server.url}/{FIRST}", **options)

    def __enter__(self) -> Frontend:
        super().__enter__()
        try:
            self.wait_for(READY, seconds=START_SECONDS)
            self.evaluate(f"() => {{ {SCRIPT.read_text(encoding='utf-8')} }}")
        except BaseException:
            self.__exit__()
            raise
        self.errors.clear()  # 404 for files of a user who has none yet
        return self

    def ask(self, name: str, *arguments, timeout: float = 60):
        """Call a function of tools/frontend.js."""
        return self.evaluate(f"(...all) => window.diffportrait3d.{name}(...all)", *arguments, timeout=timeout)

    def open(self, workflow: Path) -> None:
        """Load a workflow in the editor's form.

        Raises:
            FrontendError: it has nodes that the editor does not know
        """
        self._loaded(workflow, self.ask("open", json.loads(workflow.read_text(encoding="utf-8"))))

    def build(self, workflow: Path, layout: Path) -> None:
        """Load a workflow in API form and arrange it by its layout. See `open` for errors."""
        both = [json.loads(path.read_text(encoding="utf-8")) for path in (workflow, layout)]
        self._loaded(workflow, self.ask("build", *both))

    def run(self, seconds: float) -> dict:
        """Queue the graph and wait for its end, at most `seconds`.

        Returns what the editor was told: previews {node id: count}, progress {node id: count}, outputs [node id],
        node_errors (the host refused the graph) and error (a node failed).
        """
        return self.ask("run", seconds, timeout=seconds + 30)

    def _loaded(self, workflow: Path, unknown: list[str]) -> None:
        if unknown:
            raise FrontendError(f"{workflow}: the frontend does not know {', '.join(unknown)}.")


def prepare(server: Server, prompts: list[dict] = ()) -> None:
    """Settings that keep dialogs off the canvas, the default portrait, and a stand-in for each file a user has.

    Stand-ins let the editor's lists hold the names that `prompts` (API form) choose: the miniature's networks under
    the names of converted ones, empty files for the rest.
    """
    base = server.base_directory
    settings = base / "user/default/comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    (base / "input").mkdir(exist_ok=True)
    shutil.copy(PORTRAIT, base / "input" / PORTRAIT.name)
    networks = base / "models/diffportrait3d"
    networks.mkdir(parents=True, exist_ok=True)
    for path in MINIATURE.glob("*.safetensors"):
        (networks / path.name).symlink_to(path)
    for inputs in (node["inputs"] for prompt in prompts for node in prompt.values()):
        for name in FOLDERS.keys() & inputs.keys():
            path = base / "models" / FOLDERS[name] / inputs[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if "folder" in inputs:
            pictures = base / "input" / inputs["folder"]
            pictures.mkdir(exist_ok=True)
            shutil.copy(PORTRAIT, pictures / "0.png")


def names() -> list[str]:
    """The example workflows."""
    return sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


def prompts() -> dict[str, dict]:
    """The example workflows in API form."""
    return {name: json.loads((WORKFLOWS / f"api/{name}.json").read_text(encoding="utf-8")) for name in names()}


def write_json(path: Path, value) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def write_thumbnail(picture: Image.Image, path: Path) -> None:
    """As small as the template dialog shows it, on the canvas's grey."""
    ImageOps.pad(picture.convert("RGB"), THUMBNAIL, color="#222222").save(path, quality=80, optimize=True)


def canvas_picture(frontend: Frontend) -> Image.Image:
    """The graph without the page's menus."""
    with tempfile.TemporaryDirectory() as folder:
        frontend.screenshot(Path(folder) / "page.png")
        with Image.open(Path(folder) / "page.png") as page:
            return page.crop(frontend.ask("bounds"))


def result_picture(frontend: Frontend) -> Image.Image:
    """The view grid that the graph has made."""
    address = frontend.wait_for(GRID, seconds=10)
    with urllib.request.urlopen(address) as response:
        return Image.open(io.BytesIO(response.read()))


def save(frontend: Frontend, name: str, run: int | None, screenshots: Path | None) -> None:
    """Write workflows/NAME.json and its thumbnail: the result after a run, else, if there is none yet, the graph."""
    frontend.build(WORKFLOWS / f"api/{name}.json", WORKFLOWS / f"layout/{name}.json")
    write_json(WORKFLOWS / f"{name}.json", frontend.ask("workflow"))
    thumbnail = WORKFLOWS / f"{name}.jpg"
    if run:
        told = frontend.run(run)
        if told["error"] or told["node_errors"]:
            raise FrontendError(f"{name} failed: {told['error'] or told['node_errors']}")
        write_thumbnail(result_picture(frontend), thumbnail)
    elif not thumbnail.is_file():
        write_thumbnail(canvas_picture(frontend), thumbnail)
    if screenshots is not None:
        screenshots.mkdir(parents=True, exist_ok=True)
        frontend.screenshot(screenshots / f"{name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.frontend", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="example workflows; default: all")
    parser.add_argument("--run", type=int, metavar="SECONDS", help="run them for their thumbnails; wait at most")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="save pictures of the page here")
    parser.add_argument("--width", type=int, default=1920)
    parser.add_argument("--height", type=int, default=1080)
    options = parser.parse_args()
    try:
        with Server(cpu=True) as server:
            prepare(server, list(prompts().values()))
            with Frontend(server, width=options.width, height=options.height) as frontend:
                for name in options.names or names():
                    save(frontend, name, options.run, options.screenshots)
                    print(f"{name}: workflows/{name}.json", flush=True)
    except (BrowserError, FrontendError, HostError, ServerError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
