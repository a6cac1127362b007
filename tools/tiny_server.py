"""A real server with narrow networks: a turntable takes a blink, for commands that queue thousands of prompts."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image, ImageDraw

from diffportrait3d.networks import UNetConfig
from evaluation.goldens.narrow_files import write_networks
from tools.client import Client
from tools.host import PACK, ToolError, exit_status
from tools.server import Server


class Node:
    """Ids in the turntable."""

    LOAD, PATH, CONDITIONS, ENCODER, REFERENCE, CONTROL_NET = "1 3 4 5 6 7".split()
    CAMERAS, VIEWS, NOVEL_VIEW, NOISE, SAMPLER = "8 9 10 11 12".split()


LOADERS = {
    Node.ENCODER: "reference_encoder",
    Node.CONTROL_NET: "view_controlnet",
    Node.VIEWS: "view_consistency",
    Node.NOVEL_VIEW: "novel_view",
}
SETS = {"narrow": 1.0, "other": 0.95}  # folder of networks -> factor on the known weights
PORTRAITS = ("red.png", "green.png", "blue.png")
SIDE = 64  # pixels of a view
# glibc gives freed memory back, of 64 kB and more at once: resident is then what is in use.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
# Two levels of one block each: a UNet call is mostly Python, and takes a third of the time of four levels.
CONFIG = UNetConfig(
    model_channels=32, context_dim=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,), max_views=6
)


def prompts_command(doc: str, name: str, prompts: int, work: Callable[[int, int], str], good: str) -> int:
    """A command that queues `prompts` prompts: its exit status by what `work(prompts, seed)` says is wrong, "" if
    nothing is."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.{name}", description=doc.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    options = parser.parse_args()

    def run() -> None:
        if problem := work(options.prompts, options.seed):
            raise ToolError(problem)
        print(good)

    return exit_status(run)


@contextmanager
def tiny_server() -> Iterator[Client]:
    """A client of a server on the CPU with two sets of narrow networks and three portraits."""
    with Server(cpu=True, environment=GIVEN_BACK) as server:
        for folder, scale in SETS.items():
            networks = server.base_directory / "models/diffportrait3d" / folder
            write_networks(networks, scale, CONFIG, image_size=SIDE)
            _draw_portrait("grey").save(networks / "portrait.png")
        for name in PORTRAITS:
            _draw_portrait(name.removesuffix(".png")).save(server.base_directory / "input" / name)
        yield Client(server)


def _draw_portrait(colour: str) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).ellipse((16, 8, 48, 56), fill=colour)
    return image


def small_turntable() -> dict:
    """The template's prompt with the narrow networks: three views in one step, their latents in a file."""
    template = json.loads((PACK / "workflows/api/turntable.json").read_text(encoding="utf-8"))
    prompt = {node_id: copy.deepcopy(node) for node_id, node in template.items() if int(node_id) <= int(Node.SAMPLER)}
    prompt[Node.LOAD]["inputs"]["name"] = "narrow"
    for node_id, kind in LOADERS.items():
        prompt[node_id]["inputs"]["name"] = f"narrow/{kind}.safetensors"
    prompt[Node.PATH]["inputs"]["views"] = 3
    prompt[Node.SAMPLER]["inputs"].update(preset="custom", steps=1)
    prompt["save"] = {"class_type": "SaveLatent", "inputs": {"samples": [Node.SAMPLER, 0], "filename_prefix": "views"}}
    return prompt
