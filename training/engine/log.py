"""The log of a run: log.jsonl and tensorboard."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import time
from pathlib import Path

from diffportrait3d.files import append, append_line, write_text


class RunLog:
    """log.jsonl and tensorboard; on resuming, lines after the checkpoint are dropped."""

    def __init__(self, run_dir: Path, start: int, writes: bool):
        self.writes = writes  # one process does
        if not writes:
            return
        self.path = run_dir / "log.jsonl"
        if self.path.is_file():
            write_text(self.path, "".join(f"{line}\n" for line in _kept(self.path, start)))
        self.board = _Board(run_dir / "tensorboard", start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        append_line(self.path, json.dumps({"step": step, **values}))
        for name, value in values.items():
            self.board.add(name, value, step)


def _kept(path: Path, start: int) -> list[str]:
    """The lines up to step `start`; those that are damaged are left out and counted."""
    kept, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line.decode())
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        print(f"'{path}' is damaged: {damaged} of its lines are left out.", file=sys.stderr)
    return kept


class _Board:
    """Tensorboard's file, written at once and whole.

    torch's SummaryWriter leaves it to a thread, in which a full disk ends as a traceback.
    """

    def __init__(self, folder: Path, purge_step: int):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.path, self.purge_step = folder / name, purge_step

    def add(self, name: str, value: float, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard.summary import scalar

        if not self.path.exists():
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
            restart = SessionLog(status=SessionLog.START)  # hides what an earlier process wrote after the checkpoint
            self._write(Event(wall_time=time.time(), step=self.purge_step, session_log=restart))
        self._write(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def _write(self, event) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append(self.path, record.getvalue())
