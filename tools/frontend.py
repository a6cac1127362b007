"""Save the templates, their thumbnails and the blueprint with ComfyUI's own frontend.

    python -m tools.frontend                             # all of workflows/api
    python -m tools.frontend turntable --run 600 --screenshots /tmp/shots

`workflows/api/NAME.json` says what is computed; `workflows/layout/NAME.json` where the nodes are, the
note, and the title, which is the template's file name because the editor shows that. What the frontend makes of them
is `workflows/TITLE.json`; a subgraph may also be offered as a blueprint, `subgraphs/*.json`. The thumbnail shows
views (`--run`), or a card of text where the weights are not available. Needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont, ImageOps
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Page

from diffportrait3d.files import write_atomically, write_text
from tools.browser import open_page
from tools.demo import PORTRAIT
from tools.host import PACK, PACK_NAME, ToolError, exit_status
from tools.server import Server

WORKFLOWS = PACK / "workflows"
BLUEPRINTS = PACK / "subgraphs"
SCRIPT = PACK / "tools/frontend.js"
MINIATURE = PACK / "weights/miniature"
START_SECONDS = 180
THUMBNAIL = (640, 360)
SETTINGS = {"Comfy.Execution.PreviewMethod": "latent2rgb"}  # previews while sampling
# What people have and this repository has not: inputs that name a file of theirs, and the folder it is in.
FOLDERS = {"ckpt_name": "checkpoints", "lora_name": "loras", "control_net_name": "controlnet"}
ONE_POINT = (
    "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\nend_header\n0 0 0\n"
)
DIALOG = "[data-testid=dialog-overlay]"
READY = "() => Boolean(window.app?.extensionManager && window.app.canvas && window.LiteGraph)"
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Frontend:
    """ComfyUI's editor in a page, with the functions of tools/frontend.js.

    Args:
        page: shows the editor, which has started.
        errors: what the page's console shows in red, see `open_page`.
    """

    def __init__(self, page: Page, errors: list[str]):
        self.page, self.errors = page, errors
        page.evaluate(f"() => {{ {SCRIPT.read_text(encoding='utf-8')} }}")

    def ask(self, name: str, *arguments):
        call = f"async (all) => JSON.stringify((await window.diffportrait3d.{name}(...all)) ?? null)"
        return json.loads(self.page.evaluate(call, arguments))  # as JSON, which leaves out what is undefined

    def open(self, workflow: Path) -> None:
        """Load a workflow in the editor's form, as the dialog of templates does it.

        Raises:
            ToolError: it has nodes that the editor does not know
        """
        self._check(workflow, self.ask("open", json.loads(workflow.read_text(encoding="utf-8")), workflow.stem))

    def build(self, name: str) -> None:
        """Load a template in API form and arrange it by its layout. See `open` for errors."""
        self._check(WORKFLOWS / f"api/{name}.json", self.ask("build", prompt(name), layout(name)))

    def run(self, seconds: float) -> dict:
        """Queue the graph and wait for its end, at most `seconds`.

        Returns what the editor received: previews {node id: count}, progress {node id: count}, outputs [node id],
        files [[subfolder, name]], node_errors (the host refused the graph) and error (a node failed).
        """
        return self.ask("run", seconds)

    def _check(self, workflow: Path, unknown: list[str]) -> None:
        if unknown:
            raise ToolError(f"{workflow}: the frontend does not know {', '.join(unknown)}.")


@contextmanager
def open_editor(server: Server, **size: int) -> Iterator[Frontend]:
    """The editor with an empty graph, in a page of this size; see `open_page`."""
    with open_page(server.url, **size) as (page, errors):
        page.wait_for_function(READY, timeout=START_SECONDS * 1000)
        page.get_by_text(PACK_NAME, exact=True).first.wait_for()  # in the dialog of templates, the editor's greeting
        page.keyboard.press("Escape")
        page.locator(DIALOG).wait_for(state="detached")
        frontend = Frontend(page, errors)
        errors.clear()  # 404 for files of a user who has none yet
        yield frontend


def prepare(server: Server, prompts: list[dict] = ()) -> None:
    """Settings that keep dialogs off the canvas, the default portrait, and a stand-in for each file a user has.

    Stand-ins let the editor's lists hold the names that `prompts` (API form) choose: the miniature's networks under
    the names of converted ones, a point for splats, empty files for the rest.
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
        if "model_file" in inputs:
            splats = base / "input" / inputs["model_file"]
            splats.parent.mkdir(exist_ok=True)
            splats.write_text(ONE_POINT, encoding="utf-8")
        if "folder" in inputs:
            images = base / "input" / inputs["folder"]
            images.mkdir(exist_ok=True)
            shutil.copy(PORTRAIT, images / "0.png")


def names() -> list[str]:
    return sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


def prompt(name: str) -> dict:
    return json.loads((WORKFLOWS / f"api/{name}.json").read_text(encoding="utf-8"))


def layout(name: str) -> dict:
    """Where a template's nodes are, its title, its note."""
    return json.loads((WORKFLOWS / f"layout/{name}.json").read_text(encoding="utf-8"))


def template(name: str) -> Path:
    """The template in the editor's form; its file name is its title in the editor."""
    return WORKFLOWS / f"{layout(name)['title']}.json"


def blueprint(name: str) -> Path | None:
    """The file of a template's subgraph, where it is published; its name is the node's in the editor's library."""
    published = layout(name).get("subgraph", {}).get("blueprint")
    return BLUEPRINTS / f"{published}.json" if published else None


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def with_steady_ids(workflow: dict, file: Path) -> dict:
    """The editor's random ids, replaced by ones that depend on the file and their order only."""
    text, steady = json.dumps(workflow), {}
    for found in UUID.findall(text):
        steady.setdefault(found, str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_NAME}/{file.name}/{len(steady)}")))
    return json.loads(UUID.sub(lambda match: steady[match[0]], text))


def write_thumbnail(image: Image.Image, path: Path) -> None:
    write_atomically(path, lambda file: image.save(file, "JPEG", quality=85, optimize=True))


def sheet(views: list[Image.Image], columns: int, rows: int, size: tuple[int, int]) -> Image.Image:
    """Views spread evenly from the first to the last, in reading order, filling an image of `size`."""
    count, (width, height) = columns * rows, size
    out = Image.new("RGB", size)
    for index in range(count):
        view = views[round(index * (len(views) - 1) / (count - 1))]
        tile = ImageOps.fit(view, (width // columns, height // rows), Image.Resampling.LANCZOS)
        out.paste(tile, (index % columns * tile.width, index // columns * tile.height))
    return out


def result_image(name: str, views: list[Image.Image]) -> Image.Image:
    """What a template made of the portrait, beside the portrait if it says so."""
    about, (width, height) = layout(name)["thumbnail"], THUMBNAIL
    views = views[: about["views"]]  # the rest is the way back, or the path once more
    left = height if about.get("portrait") else 0
    out = Image.new("RGB", THUMBNAIL)
    if left:
        with Image.open(PORTRAIT) as portrait:
            out.paste(ImageOps.fit(portrait.convert("RGB"), (left, height), Image.Resampling.LANCZOS), (0, 0))
    out.paste(sheet(views, about["columns"], about["rows"], (width - left, height)), (left, 0))
    return out


def card(heading: str, lines: list[str]) -> Image.Image:
    """Text as an image, for templates whose weights are not available: what it is for and what it needs."""
    out = Image.new("RGB", THUMBNAIL, "#1d2733")
    draw = ImageDraw.Draw(out)
    draw.rectangle((0, 0, 15, THUMBNAIL[1]), fill="#3f789e")
    draw.text((48, 40), heading, fill="white", font=ImageFont.load_default(46), spacing=10)
    draw.text((48, 200), "\n".join(lines), fill="#a9c3d8", font=ImageFont.load_default(25), spacing=12)
    return out


def run_for_views(frontend: Frontend, name: str, seconds: int, outputs: Path) -> list[Image.Image]:
    """Run the graph in the editor with as many views as the thumbnail shows; returns the frames of the video that it
    saved, or the images where it saved no video.

    Raises:
        ToolError: the graph was refused or failed, or saved nothing
    """
    frontend.ask("setViews", layout(name)["thumbnail"]["views"])
    seen = frontend.run(seconds)
    if seen["error"] or seen["node_errors"]:
        raise ToolError(f"{name} failed: {seen['error'] or seen['node_errors']}")
    saved = [path for folder, file in seen["files"] if (path := outputs / folder / file).is_file()]  # no previews
    for video in (path for path in saved if path.suffix == ".mp4"):
        with av.open(str(video)) as container:
            return [frame.to_image() for frame in container.decode(video=0)]
    if not saved:
        raise ToolError(f"{name} saved no views.")
    return [Image.open(path).convert("RGB") for path in saved]


def save(frontend: Frontend, name: str, run: int | None, outputs: Path, screenshots: Path | None) -> None:
    """Write a template, its blueprint, and its thumbnail: a card, or after a run the views."""
    frontend.build(name)
    about, file = layout(name), template(name)
    write_json(file, with_steady_ids(frontend.ask("workflow"), file))
    if published := blueprint(name):
        write_json(published, with_steady_ids(frontend.ask("blueprint", about["subgraph"]), published))
    if "card" in about:
        write_thumbnail(card(**about["card"]), file.with_suffix(".jpg"))
    elif run:
        views = run_for_views(frontend, name, run, outputs)
        write_thumbnail(result_image(name, views), file.with_suffix(".jpg"))
    if screenshots is not None:
        screenshots.mkdir(parents=True, exist_ok=True)
        frontend.page.wait_for_load_state("networkidle")  # what nodes show
        frontend.page.screenshot(path=screenshots / f"{name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.frontend", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="templates; default: all")
    parser.add_argument(
        "--run", type=int, metavar="SECONDS", help="run those that run here, for their thumbnails; wait at most"
    )
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="save images of the page here")
    parser.add_argument("--width", type=int, default=1920)
    parser.add_argument("--height", type=int, default=1080)
    options = parser.parse_args()

    def work() -> None:
        with Server(cpu=True) as server:
            prepare(server, [prompt(name) for name in names()])
            with open_editor(server, width=options.width, height=options.height) as frontend:
                for name in options.names or names():
                    save(frontend, name, options.run, server.base_directory / "output", options.screenshots)
                    print(f"{name}: {template(name).relative_to(PACK)}", flush=True)

    return exit_status(work, PlaywrightError)


if __name__ == "__main__":
    sys.exit(main())
