"""The log of a run: log.jsonl and tensorboard."""

from __future__ import annotations

import json
from pathlib import Path

from diffportrait3d.files import append_line, write_text


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
            write_text(self.path, "".join(line + "\n" for line in kept))
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        append_line(self.path, json.dumps({"step": step, **values}))
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writes:
            self.board.close()
