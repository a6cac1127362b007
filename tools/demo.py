"""A turntable from one portrait through the real ComfyUI server: `make demo`, `make demo PORTRAIT=face.png`.

Writes outputs/demo/<time>/ with view_00.png ..., grid.png (portrait and views) and turntable.webp (and .gif if small).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import signal
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageOps

from diffportrait3d.files import write_folder
from diffportrait3d.images import ImageError, read_image
from tools.client import Client, Run, title
from tools.host import PACK, ToolError, exit_status
from tools.server import Server

WORKFLOW = PACK / "workflows/api/turntable.json"
PORTRAIT = PACK / "weights/miniature/portrait.png"
OUTPUTS = PACK / "outputs/demo"
OWN_PORTRAIT = 3  # Load Miniature's output of that name
FRAME_MILLISECONDS = 120
GIF_MAX_BYTES = 2 << 20
ABOUT_PHOTOGRAPHS = (
    "Note: the miniature has only ever seen rendered heads. Of a photograph it makes a rendered"
    " head that is not the person; real photographs want the weights that the authors released."
)


def load_workflow(path: Path) -> dict:
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ToolError(f"There is no workflow {path}.") from None
    except ValueError as error:
        raise ToolError(f"{path} is not JSON: {error}.") from None
    if not isinstance(prompt, dict) or not prompt or "nodes" in prompt:
        raise ToolError(f"{path} is not in API format: export it with `Export (API)` in ComfyUI's menu.")
    return prompt


def portrait_node(prompt: dict) -> str:
    """The id of the one LoadImage node, where the portrait goes in. A workflow that takes the miniature's own portrait
    gets that node, in place of the miniature's output.
    """
    found = [node_id for node_id, node in prompt.items() if node["class_type"] == "LoadImage"]
    own = [node_id for node_id, node in prompt.items() if node["class_type"] == "DP3D_LoadMiniature"]
    if not found and own:
        for node in prompt.values():
            inputs = node["inputs"]
            inputs.update({name: ["portrait", 0] for name, wire in inputs.items() if wire == [own[0], OWN_PORTRAIT]})
        prompt["portrait"] = {"class_type": "LoadImage", "inputs": {}, "_meta": {"title": "Portrait"}}
        return "portrait"
    if len(found) != 1:
        raise ToolError(f"The workflow has {len(found)} LoadImage nodes; the portrait needs exactly one.")
    return found[0]


def check_portrait(path: Path) -> Image.Image:
    """The portrait, whatever kind of image file it is, as upright RGB; prints what was decided about it."""
    if not path.exists():
        raise ToolError(
            f"There is no portrait {path}. Give one with PORTRAIT=file; the default one comes with the"
            " miniature's weights (`make miniature`)."
        )
    try:
        image = read_image(path)
    except ImageError as error:
        raise ToolError(f"The portrait {path} is not a readable image: {error.reason}.") from None
    for note in image.notes:
        print(f"{path.name}: {note}")
    return Image.fromarray(image.as_bytes())


def choose_views(prompt: dict, run: Run) -> str:
    """The id of the node that saved the views: the one with the most images."""
    if not run.images:
        raise ToolError("The workflow saved no image.")
    return max(run.images, key=lambda node_id: len(run.images[node_id]))


def make_grid(portrait: Image.Image, views: list[Image.Image]) -> Image.Image:
    """The portrait at the left, as high as all rows; the views in one row up to six, then in two."""
    width, height = views[0].size
    rows = 1 if len(views) <= 6 else 2
    columns = math.ceil(len(views) / rows)
    side = rows * height
    grid = Image.new("RGB", (side + columns * width, side), "white")
    grid.paste(ImageOps.fit(portrait, (side, side), Image.Resampling.LANCZOS), (0, 0))
    for index, view in enumerate(views):
        grid.paste(view, (side + index % columns * width, index // columns * height))
    return grid


def write_results(folder: Path, portrait: Image.Image, files: list[bytes]) -> list[Path]:
    """Write views, grid and turntable; `folder` appears whole or not at all."""
    views = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    first, *others = views + views[-2:0:-1]  # along an open arc: to its end and back, without a jump
    animation = {"save_all": True, "append_images": others, "duration": FRAME_MILLISECONDS, "loop": 0}

    def fill(part: Path) -> None:
        for index, data in enumerate(files):
            (part / f"view_{index:02d}.png").write_bytes(data)
        make_grid(portrait, views).save(part / "grid.png")
        first.save(part / "turntable.webp", quality=90, method=4, **animation)
        first.save(part / "turntable.gif", **animation)
        if (part / "turntable.gif").stat().st_size > GIF_MAX_BYTES:
            (part / "turntable.gif").unlink()

    write_folder(folder, fill)
    return sorted(folder.iterdir())


def report(prompt: dict, run: Run, count: int, total: float) -> None:
    print(f"{count} views in {total:.1f} s: {total / count:.2f} s per view")
    for node_id, seconds in sorted(run.seconds.items(), key=lambda item: -item[1])[:4]:
        if seconds >= 0.05:
            print(f"  {seconds:6.1f} s  {title(prompt, node_id)}")


def demo(options: argparse.Namespace) -> None:
    prompt = load_workflow(options.workflow)
    node_id = portrait_node(prompt)
    if options.portrait is not None:
        print(ABOUT_PHOTOGRAPHS)
    source = options.portrait or PORTRAIT
    image = check_portrait(source)
    print("Starting ComfyUI ...", flush=True)
    start = time.monotonic()
    with Server(options.port) as server, tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / f"{source.stem}.png"  # not the file: the host drops transparency and clips 16 bits
        image.save(path)
        print(f"  ready on {server.url} after {time.monotonic() - start:.1f} s", flush=True)
        start = time.monotonic()
        run = Client(server).run(prompt, {node_id: path})
        total = time.monotonic() - start
    files = run.images[choose_views(prompt, run)]
    folder = options.outputs / time.strftime("%Y%m%d-%H%M%S")
    written = write_results(folder, image, files)
    report(prompt, run, len(files), total)
    others = [file.name for file in written if not file.name.startswith("view_")]
    print(f"Written to {folder}:", *others, f"view_00.png ... view_{len(files) - 1:02d}.png", sep="\n  ")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--portrait", type=Path, help="an image file; default: a held-out rendered head")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="a workflow in API format")
    parser.add_argument("--port", type=int, help="port on 127.0.0.1; default: a free one")
    parser.add_argument("--outputs", type=Path, default=OUTPUTS, help="folder for the results")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that the server is stopped
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background jobs ignore it
    try:
        return exit_status(lambda: demo(options))
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
