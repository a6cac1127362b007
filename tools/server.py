"""The real ComfyUI server as a child process that never outlives its `with` block."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tools.host import PACK_NAME, ToolError, find_host, link_pack

READY_SECONDS = 600  # a dead server is noticed at once; this is for a busy machine
STOP_SECONDS = 10


class Server:
    """`with Server() as server: ...` runs ComfyUI with this pack alone, in a temporary base directory.

    Args:
        port: TCP port on 127.0.0.1; None picks a free one
        cpu: run on the CPU even where there is an accelerator; None decides by torch
        options: more of ComfyUI's command-line options
        environment: more environment variables of the process

    Raises on entry:
        ToolError: the port is taken, there is no ComfyUI (see tools/host.py), or it did not come up
    """

    def __init__(
        self,
        port: int | None = None,
        cpu: bool | None = None,
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ):
        self.port, self.cpu, self.options, self.environment = port, cpu, options, environment or {}
        self.process: subprocess.Popen | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_directory(self) -> Path:
        return Path(self._folder.name)

    def __enter__(self) -> Server:
        host = find_host()
        self.port = _claim_port(self.port)
        self._folder = tempfile.TemporaryDirectory(prefix="diffportrait3d-host-")
        try:
            self._start(host)
            self._wait_until_ready()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)  # a background child may ignore SIGINT
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._folder.cleanup()

    def check_alive(self) -> None:
        """Raise ToolError if the process has ended."""
        code = self.process.poll()
        if code is not None:
            raise ToolError(f"The ComfyUI server ended with exit code {code}. Its last words:\n{self.log_tail()}")

    def log(self) -> str:
        """What the server has printed so far, without colours."""
        text = (self.base_directory / "server.log").read_text(encoding="utf-8", errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def log_tail(self) -> str:
        return "\n".join(self.log().strip().splitlines()[-12:])

    def _start(self, host: Path) -> None:
        pack = link_pack(self.base_directory).name
        if self.cpu is None:
            import torch

            self.cpu = not torch.accelerator.is_available()
        command = [
            *(sys.executable, str(host / "main.py")),
            *("--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(self.base_directory)),
            *("--disable-all-custom-nodes", "--whitelist-custom-nodes", pack, "--disable-api-nodes"),
            *("--disable-auto-launch", "--database-url", "sqlite:///:memory:", "--use-pytorch-cross-attention"),
            *(["--cpu"] if self.cpu else []),
            *self.options,
        ]
        with open(self.base_directory / "server.log", "wb") as log:
            # Its own session, so that Ctrl-C reaches us alone and the server is stopped in order.
            # Threads that spin while they wait make two busy cores several times slower.
            environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUTF8": "1", **self.environment}
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = subprocess.Popen(command, cwd=host, start_new_session=True, env=environment, **streams)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        else:
            raise ToolError(
                f"The ComfyUI server did not answer on {self.url} within {READY_SECONDS} s. Its last"
                f" words:\n{self.log_tail()}"
            )
        if (failure := pack_failure(self.log())) is not None:
            raise ToolError(f"ComfyUI could not load this pack: {failure}")


def pack_failure(log: str) -> str | None:
    """The line in which ComfyUI says why this pack is missing, or None where it loaded it."""
    failure = re.compile(rf"(Cannot import|Error while calling comfy_entrypoint in|Skip) .*{PACK_NAME}\b.*")
    return next((found[0] for found in map(failure.search, log.splitlines()) if found), None)


def _claim_port(port: int | None) -> int:
    """The port if it is free, or any free one for None."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise ToolError(
                f"Port {port} cannot be used ({error.strerror}): stop what listens there, choose another"
                " with PORT=number, or leave PORT out to use a free one."
            ) from None
        return probe.getsockname()[1]
