"""A real server with narrow networks: a turntable takes a blink, for commands that queue thousands of prompts."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import requests
from PIL import Image, ImageDraw

from diffportrait3d.networks import UNetConfig
from evaluation.goldens.narrow_files import write_networks
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
# Two levels of one block each: a UNet call is mostly Python, and takes a third of the time of four levels.
CONFIG = UNetConfig(
    model_channels=32, context_dim=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,), max_views=6
)
HANG_SECONDS = 600  # as a run may take on a busy machine
CLOSING_SECONDS = 2  # a server that ends closes its sockets first


class HangError(ToolError):
    """A prompt has not ended in time."""


class TinyServer:
    """A client of the server; see `tiny_server`."""

    def __init__(self, server: Server):
        self.server = server
        self._session = requests.Session()

    def submit(self, prompt: dict) -> tuple[int, dict]:
        """HTTP status and answer of POST /prompt. See `_ask` for errors."""
        body = json.dumps({"prompt": prompt})  # as text: NaN and infinity are sent as a client would send them
        response = self._ask("post", "prompt", data=body, headers={"Content-Type": "application/json"})
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return response.status_code, response.json() if is_json else {"error": response.text}

    def wait(self, prompt_id: str) -> dict:
        """The prompt's entry in the history, once it has ended; it is taken out, the host would keep 10,000.

        Raises:
            HangError: not in HANG_SECONDS. See `_ask` for others.
        """
        begun, pause = time.monotonic(), 0.01
        while time.monotonic() - begun < HANG_SECONDS:
            history = self._ask("get", f"history/{prompt_id}").json()
            if prompt_id in history:
                self.post("history", delete=[prompt_id])
                return history[prompt_id]
            self.server.check_alive()
            time.sleep(pause)
            pause = min(1.2 * pause, 0.1)
        raise HangError(f"prompt {prompt_id} has not ended in {HANG_SECONDS} s")

    def post(self, path: str, **values) -> None:
        self._ask("post", path, json=values).raise_for_status()

    def node_info(self) -> dict[str, dict]:
        return self._ask("get", "object_info").json()

    def _ask(self, method: str, path: str, **options) -> requests.Response:
        """Raises ServerError if the server has ended."""
        try:
            return self._session.request(method, f"{self.server.url}/{path}", timeout=HANG_SECONDS, **options)
        except requests.ConnectionError:
            time.sleep(CLOSING_SECONDS)
            self.server.check_alive()
            raise

    def megabytes(self) -> float:
        return psutil.Process(self.server.process.pid).memory_info().rss / 1e6


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
def tiny_server() -> Iterator[TinyServer]:
    """A server on the CPU with two sets of narrow networks and three portraits."""
    with Server(cpu=True) as server:
        for folder, scale in SETS.items():
            networks = server.base_directory / "models/diffportrait3d" / folder
            write_networks(networks, scale, CONFIG, image_size=SIDE)
            _draw_portrait("grey").save(networks / "portrait.png")
        for name in PORTRAITS:
            _draw_portrait(name.removesuffix(".png")).save(server.base_directory / "input" / name)
        yield TinyServer(server)


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
