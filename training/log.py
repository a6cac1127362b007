"""The log of a run: log.jsonl and tensorboard."""

from __future__ import annotations

import json
from pathlib import Path

from .state import write_atomically


class RunLog:
    """log.jsonl and tensorboard; on resuming, lines after the checkpoint are dropped."""

    def __init__(self, run_dir: Path, start: int, writes: bool):
        self.writes = writes  # one process does
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "log.jsonl"
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= start]
            write_atomically(self.path, lambda p: p.write_text("".join(line + "\n" for line in kept), encoding="utf-8"))
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writes:
            self.board.close()
