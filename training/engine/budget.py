"""A fixed time for all stages of a run: who gets how much of what is left, over interruptions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from diffportrait3d.files import write_text

from .config import Settings
from .state import newest_checkpoint

FILE = "minutes.json"


class BudgetConfig(Settings):
    """How a preset divides the time (`configs/<preset>/minutes.yaml`).

    Attributes:
        shares: of the stages in the training time, in any unit.
        around: seconds beside the training that a stage is expected to take: building it, latents, validation, files.
        first_people: training people that must be there before the first stage begins.
    """

    shares: dict[str, float]
    around: float
    first_people: int


class Budget:
    """The time of the run in `out`.

    What an interrupted run has used counts: of its stages what they have trained, and what the file says of the rest.

    Raises:
        ValueError: the run was started with another time.
    """

    def __init__(self, out: Path, minutes: float, config: BudgetConfig):
        self.path, self.minutes, self.config, self.start = out / FILE, minutes, config, time.monotonic()
        self.before = 0.0  # seconds of earlier processes beside the training
        if self.path.is_file():
            there = json.loads(self.path.read_text(encoding="utf-8"))
            if there["minutes"] != minutes:
                raise ValueError(f"'{out}' was started with --minutes {there['minutes']:g}; continue it with these.")
            self.before = there["beside"]
        trained = [trained_seconds(out / name) for name in config.shares]
        self.begun = sum(trained)  # seconds of training by earlier processes
        self.deadline = self.start + 60 * minutes - self.before - self.begun

    def left(self) -> float:
        """Seconds until the end."""
        return self.deadline - time.monotonic()

    def planned(self, stage: str) -> float:
        """Minutes of training that a stage has by its share of the whole time."""
        shares = self.config.shares
        return max(0.0, self.minutes - self.around()) * shares[stage] / sum(shares.values())

    def around(self) -> float:
        """Minutes that are expected beside the training."""
        return self.config.around * len(self.config.shares) / 60

    def training_minutes(self, stage: str, run_dir: Path) -> float:
        """Of a stage that has been built, over all its interruptions: its share of what is left to it and those
        behind it."""
        names = list(self.config.shares)
        behind = names[names.index(stage) :]
        share = self.config.shares[stage] / sum(self.config.shares[name] for name in behind)
        # Of its own `around` about half, the building, is over.
        seconds = (self.left() - self.config.around * (len(behind) - 0.5)) * share
        return (trained_seconds(run_dir) + max(1.0, seconds)) / 60

    def note(self, trained: float) -> float:
        """Keep what has been used until now; `trained`: seconds of it in which stages of this process trained. Returns
        those beside the training, of all processes."""
        beside = self.before + time.monotonic() - self.start - trained
        write_text(self.path, json.dumps({"minutes": self.minutes, "beside": round(beside, 2)}))
        return beside


def trained_seconds(run_dir: Path) -> float:
    """What a stage has trained, by its summary or its newest checkpoint."""
    summary = run_dir / "summary.json"
    if summary.is_file():
        return 60 * json.loads(summary.read_text(encoding="utf-8"))["minutes"]
    found: tuple[Path, dict[str, Any]] | None = newest_checkpoint(run_dir)
    return found[1]["elapsed"] if found else 0.0
