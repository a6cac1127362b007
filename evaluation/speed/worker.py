"""A process that measures what cannot share this one."""

from __future__ import annotations

import json
import subprocess
from typing import Any


class Worker:
    """A script that reads requests, a list in JSON on each line, and writes an answer to each.

    Args:
        command: that runs it. settings: of `subprocess.Popen`.
    """

    def __init__(self, command: list[str], **settings: Any):
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **settings)

    def ask(self, *request: Any) -> Any:
        """The answer to what a request begins with.

        Raises:
            ValueError: it has ended; its message is above.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"The process that measures ended with status {self.process.wait()}; see above.")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
