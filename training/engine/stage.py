"""What one training script gives to the loop (``training.engine.loop``): networks, batches, a loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Stage:
    """What one training script gives to the loop. Subclasses set the attributes and fill in the methods.

    Attributes:
        name: the stage's name, also its summary's.
        trainable: the one network whose parameters are trained.
        frozen: networks that take part but must not change; the loop puts them in eval mode without gradients.
        sampler: yields batches by ``next()``; its position is ``state_dict()`` / ``load_state_dict()``.
        branches: batches differ in which layers of the trained network they use (FSDP cannot do that).
        full_precision: frozen networks that always stay in float32.
    """

    branches = False
    full_precision = ("autoencoder",)

    name: str
    trainable: nn.Module
    frozen: dict[str, nn.Module]
    sampler: Any

    def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """Losses of one batch; the entry "loss" is minimised, all are logged. May draw from torch's global RNG."""
        raise NotImplementedError

    @classmethod
    def without_data(cls, config: Any, device: torch.device, source: Any, resolution: int) -> Stage:
        """The stage with its networks and nothing to train them on, for a plan."""
        stage = cls.__new__(cls)
        stage.prepare(config, device, source, resolution)
        return stage

    def prepare(self, config: Any, device: torch.device, source: Any, resolution: int | None = None) -> None:
        """Check the settings and build the networks: all that a step needs but its batch.

        Args:
            source: gives networks by their kind (``training.objectives.denoising.NetworkSource``).
            resolution: of the pictures, in pixels.
        """
        raise NotImplementedError

    def rehearse(self, samples: int, resolution: int) -> dict[str, Tensor]:
        """Losses of a made-up batch: the same work as a real one of so many samples, without its values."""
        raise NotImplementedError

    def samples(self, batch: Any) -> int:
        """Number of training images in a batch."""
        return len(batch)

    def validate(self, picture: Path) -> dict[str, float]:
        """Numbers to log; writes a grid to ``picture``. Runs on the averaged weights under ``no_grad``."""
        return {}

    def finish(self, run_dir: Path, summary: dict[str, Any]) -> None:
        """Write the trained network (averaged weights are in place)."""
        raise NotImplementedError
