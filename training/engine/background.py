"""A command of this project that runs beside its caller and ends with it."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

STOP = signal.SIGINT  # as by Ctrl-C: what is finished stays, its worker processes end, too


class Background:
    """`python -m module arguments`, from construction on. A context: it is stopped at the end, also if the caller is
    killed (on Linux). What it prints is in the file `log`."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path):
        self.module, self.log = module, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def running(self) -> bool:
        """Whether it still works.

        Raises:
            ValueError: it has failed; the message names the log.
        """
        status = self.process.poll()
        if status:
            raise ValueError(f"{self.module} failed with status {status}; its message is in '{self.log}'.")
        return status is None

    def stop(self) -> None:
        """End it now."""
        if self.process.poll() is None:
            self.process.send_signal(STOP)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def _end_with_parent() -> None:
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, STOP)
