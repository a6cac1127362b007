"""A client of the ComfyUI server: prompts are submitted and waited for, or run with their progress shown."""

from __future__ import annotations

import copy
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm
from websocket import WebSocket, WebSocketException, WebSocketTimeoutException, create_connection

from tools.host import ToolError
from tools.server import Server

POLL_SECONDS = 2.0
HANG_SECONDS = 600  # as a run may take on a busy machine
_MISSING_FILE = (
    ". Is the file where the node looks? The miniature's are in weights/miniature/, trained by `make miniature`."
)


@dataclass
class Run:
    """A finished workflow.

    images: node id -> PNG files in the order of the batch
    seconds: node id -> time spent in it; nodes that did not run are missing
    """

    images: dict[str, list[bytes]]
    seconds: dict[str, float]


class Client:
    """Of a running server. Every method raises ToolError if the server has ended or a connection breaks."""

    def __init__(self, server: Server):
        self.server, self._session = server, requests.Session()
        self._session.trust_env = False  # a proxy does not know this machine's servers

    def run(self, prompt: dict, uploads: dict[str, Path] | None = None) -> Run:
        """Submit `prompt` (API format), show its progress and wait for its end.

        Args:
            uploads: node id of a LoadImage -> image file to upload for it

        Raises:
            ToolError: refused, failed or interrupted
        """
        prompt, client_id = copy.deepcopy(prompt), uuid.uuid4().hex
        for node_id, path in (uploads or {}).items():
            prompt[node_id]["inputs"]["image"] = self._upload(path)
        url = f"{self.server.url.replace('http', 'ws')}/ws?clientId={client_id}"
        with self._connection(), closing(create_connection(url, HANG_SECONDS, http_no_proxy=["127.0.0.1"])) as socket:
            prompt_id = self.queue(prompt, client_id=client_id)
            seconds = self._follow(socket, prompt, prompt_id)
        outputs = self.wait(prompt_id)["outputs"]
        images = {}
        for node_id, output in outputs.items():
            for entry in output.get("images", []):
                images.setdefault(node_id, []).append(self._get("view", **entry).content)
        return Run(images, seconds)

    def queue(self, prompt: dict, **more) -> str:
        """The id of a prompt that the server accepts whole; ToolError if it does not."""
        status, answer = self.submit(prompt, **more)
        # With several outputs the host runs the valid ones and drops the rest: here that is an error too.
        if status != 200 or answer.get("node_errors"):
            raise ToolError(_refusal(answer, prompt))
        return answer["prompt_id"]

    def submit(self, prompt: dict, **more) -> tuple[int, dict]:
        """HTTP status and answer of POST /prompt."""
        body = json.dumps({"prompt": prompt, **more})  # as text: NaN and infinity are sent as a client would send them
        response = self._ask("post", "prompt", data=body, headers={"Content-Type": "application/json"})
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return response.status_code, response.json() if is_json else {"error": response.text}

    def wait(self, prompt_id: str) -> dict:
        """The prompt's entry in the history, once it has ended; it is taken out, the host would keep 10,000.

        Raises:
            ToolError: not in HANG_SECONDS
        """
        begun, pause = time.monotonic(), 0.01
        while time.monotonic() - begun < HANG_SECONDS:
            history = self._get(f"history/{prompt_id}").json()
            if prompt_id in history:
                self.post("history", delete=[prompt_id])
                return history[prompt_id]
            self.server.check_alive()
            time.sleep(pause)
            pause = min(1.2 * pause, 0.1)
        raise ToolError(f"prompt {prompt_id} has not ended in {HANG_SECONDS} s")

    def post(self, path: str, **values) -> None:
        self._ask("post", path, json=values).raise_for_status()

    def node_info(self) -> dict[str, dict]:
        return self._get("object_info").json()

    def _get(self, path: str, **values) -> requests.Response:
        response = self._ask("get", path, params=values)
        response.raise_for_status()
        return response

    def _ask(self, method: str, path: str, **options) -> requests.Response:
        with self._connection():
            return self._session.request(method, f"{self.server.url}/{path}", timeout=HANG_SECONDS, **options)

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except (requests.ConnectionError, WebSocketException, ConnectionError) as error:
            time.sleep(POLL_SECONDS)  # a dying server closes its sockets first
            self.server.check_alive()
            raise ToolError(f"The connection to {self.server.url} broke: {error}.") from error

    def _upload(self, path: Path) -> str:
        files = {"image": (path.name, path.read_bytes())}
        response = self._ask("post", "upload/image", data={"overwrite": "true"}, files=files)
        if response.status_code != 200:
            raise ToolError(f"The server refused the upload of {path}: {response.status_code} {response.text}")
        answer = response.json()
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else answer["name"]

    def _follow(self, socket: WebSocket, prompt: dict, prompt_id: str) -> dict[str, float]:
        """Show progress until the workflow ends; returns the seconds spent in each node."""
        seconds, node, since, bar = {}, None, time.monotonic(), None
        socket.settimeout(POLL_SECONDS)
        try:
            while True:
                try:
                    message = socket.recv()
                except WebSocketTimeoutException:
                    self.server.check_alive()
                    continue
                if not message or isinstance(message, bytes):
                    continue  # the end, after which `recv` raises, or a preview image
                event = json.loads(message)
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
                    raise ToolError(
                        f"{title(prompt, data['node_id'])} failed: {data['exception_message'].strip()}"
                        f" ({data['exception_type']})"
                    )
                if kind == "execution_interrupted":
                    raise ToolError(f"{title(prompt, data['node_id'])} was interrupted.")
        finally:
            _close(bar)


def _refusal(answer: dict, prompt: dict) -> str:
    for node_id, problem in (answer.get("node_errors") or {}).items():
        reason = problem["errors"][0]
        sentence = f"ComfyUI refused {title(prompt, node_id)}: {reason['message']}: {reason['details']}"
        return sentence + (_MISSING_FILE if reason.get("type") == "value_not_in_list" else "")
    error = answer.get("error") or answer
    if not isinstance(error, dict):
        return f"ComfyUI refused the workflow: {error}"
    return f"ComfyUI refused the workflow: {error.get('message')} {error.get('details') or ''}".rstrip()


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


def title(prompt: dict, node_id: str) -> str:
    """How a person knows the node: its title in the workflow, else its class."""
    node = prompt.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type") or f"node {node_id}"
