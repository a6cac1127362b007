"""The log of a run: log.jsonl and tensorboard."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from diffportrait3d.files import append_line, write_text


class RunLog:
    """log.jsonl and tensorboard; on resuming, lines after the checkpoint are dropped."""

    def __init__(self, run_dir: Path, start: int, writes: bool):
        self.writes = writes  # one process does
        if not writes:
            return
        self.path = run_dir / "log.jsonl"
        if self.path.is_file():
            write_text(self.path, "".join(f"{line}\n" for line in _kept(self.path, start)))
        self.board = SummaryWriter(run_dir / "tensorboard", purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        append_line(self.path, json.dumps({"step": step, **values}))
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()


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
