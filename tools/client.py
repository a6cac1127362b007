"""A ComfyUI client: upload, submit, follow, fetch, over HTTP and the websocket."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from tqdm import tqdm

from tools.host import ToolError
from tools.server import Server

POLL_SECONDS = 2.0
CLOSED = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
_MISSING_FILE = (
    ". Is the file where the node looks? The miniature's are in weights/miniature/, trained by `make miniature`."
)


class RunError(ToolError):
    """The server refused the workflow or a node failed; the message is one sentence for a person."""


@dataclass
class Run:
    """A finished workflow.

    images: node id -> PNG files in the order of the batch
    seconds: node id -> time spent in it; nodes that did not run are missing
    """

    images: dict[str, list[bytes]]
    seconds: dict[str, float]


async def run_workflow(server: Server, prompt: dict, uploads: dict[str, Path] | None = None) -> Run:
    """Submit `prompt` (API format) and wait for its end.

    Args:
        uploads: node id of a LoadImage -> image file to upload for it

    Raises:
        RunError: refused, failed or interrupted
        ServerError: the server ended
    """
    client_id = uuid.uuid4().hex
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(server.url, timeout=timeout) as session:
        try:
            prompt = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in prompt.items()}
            for node_id, path in (uploads or {}).items():
                prompt[node_id]["inputs"]["image"] = await _upload(session, path)
            async with session.ws_connect("/ws", params={"clientId": client_id}, max_msg_size=0) as socket:
                prompt_id = await _submit(session, prompt, client_id)
                seconds = await _follow(server, socket, prompt, prompt_id)
            return Run(await _fetch(session, prompt_id), seconds)
        except (aiohttp.ClientConnectionError, ConnectionError) as error:
            await asyncio.sleep(POLL_SECONDS)  # a dying server closes its sockets first
            server.check_alive()
            raise RunError(f"The connection to {server.url} broke: {error}.") from error


async def _upload(session: aiohttp.ClientSession, path: Path) -> str:
    form = aiohttp.FormData()
    form.add_field("image", path.read_bytes(), filename=path.name, content_type="application/octet-stream")
    form.add_field("overwrite", "true")
    async with session.post("/upload/image", data=form) as response:
        if response.status != 200:
            raise RunError(f"The server refused the upload of {path}: {response.status} {await response.text()}")
        answer = await response.json()
    return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else answer["name"]


async def _submit(session: aiohttp.ClientSession, prompt: dict, client_id: str) -> str:
    async with session.post("/prompt", json={"prompt": prompt, "client_id": client_id}) as response:
        answer = await response.json()
    # With several outputs the host runs the valid ones and drops the rest: here that is an error too.
    if response.status != 200 or answer.get("node_errors"):
        raise RunError(_refusal(answer, prompt))
    return answer["prompt_id"]


def _refusal(answer: dict, prompt: dict) -> str:
    for node_id, problem in (answer.get("node_errors") or {}).items():
        reason = problem["errors"][0]
        sentence = f"ComfyUI refused {title(prompt, node_id)}: {reason['message']}: {reason['details']}"
        return sentence + (_MISSING_FILE if reason.get("type") == "value_not_in_list" else "")
    error = answer.get("error") or answer
    if not isinstance(error, dict):
        return f"ComfyUI refused the workflow: {error}"
    return f"ComfyUI refused the workflow: {error.get('message')} {error.get('details') or ''}".rstrip()


async def _follow(server: Server, socket, prompt: dict, prompt_id: str) -> dict[str, float]:
    """Show progress until the workflow ends; returns the seconds spent in each node."""
    seconds, node, since, bar = {}, None, time.monotonic(), None
    try:
        while True:
            try:
                message = await socket.receive(timeout=POLL_SECONDS)
            except TimeoutError:
                server.check_alive()
                continue
            if message.type in CLOSED:
                raise ConnectionError("the server closed the websocket")
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # binary messages are preview images
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "progress" and data["node"] in prompt:
                bar = _advance(bar, title(prompt, data["node"]), data["value"], data["max"])
            if kind in ("executing", "execution_success", "execution_error", "execution_interrupted"):
                now = time.monotonic()
                if node is not None:
                    seconds[node] = seconds.get(node, 0.0) + now - since
                node, since = data.get("node"), now
                bar = _close(bar)
            if kind == "execution_success":
                return seconds
            if kind == "execution_error":
                raise RunError(
                    f"{title(prompt, data['node_id'])} failed: {data['exception_message'].strip()}"
                    f" ({data['exception_type']})"
                )
            if kind == "execution_interrupted":
                raise RunError(f"{title(prompt, data['node_id'])} was interrupted.")
    finally:
        _close(bar)


def _advance(bar: tqdm | None, label: str, value: int, total: int) -> tqdm:
    if bar is None or bar.desc != label:
        _close(bar)
        bar = tqdm(total=total, desc=label)
    if bar.total != total:  # a node that works in several rounds
        bar.reset(total)
    bar.update(value - bar.n)
    return bar


def _close(bar: tqdm | None) -> None:
    if bar is not None:
        bar.close()


async def _fetch(session: aiohttp.ClientSession, prompt_id: str) -> dict[str, list[bytes]]:
    history = {}
    while prompt_id not in history:  # written right after the last message
        async with session.get(f"/history/{prompt_id}") as response:
            response.raise_for_status()
            history = await response.json()
        await asyncio.sleep(0.05)
    outputs = history[prompt_id]["outputs"]
    images = {}
    for node_id, output in outputs.items():
        for entry in output.get("images", []):
            async with session.get("/view", params=entry) as response:
                response.raise_for_status()
                images.setdefault(node_id, []).append(await response.read())
    return images


def title(prompt: dict, node_id: str) -> str:
    """How a person knows the node: its title in the workflow, else its class."""
    node = prompt.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type") or f"node {node_id}"
