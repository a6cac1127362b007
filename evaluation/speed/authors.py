"""The authors' code beside ours, in a process of its own with the same weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from diffportrait3d.networks import UNetConfig

from ..goldens.data import PREFIXES
from .worker import Worker

SCRIPT = Path(__file__).with_name("authors_steps.py")


class AuthorsPath:
    """Guided steps with all parts, in groups of 8 views.

    Args:
        folder: of their inference.py. python: that can import what it needs.
        weights: a state dict per network. config: their sizes.

    Raises:
        ValueError: it does not start; its message is above.
    """

    counted = False

    def __init__(self, folder: Path, python: str, weights: dict[str, dict[str, Tensor]], config: UNetConfig):
        self.sizes = {"model_channels": config.model_channels, "context_dim": config.context_dim}
        self.worker = Worker([python, str(SCRIPT)])
        named = {PREFIXES[kind] + name: tensor for kind, group in weights.items() for name, tensor in group.items()}
        with tempfile.TemporaryDirectory() as temporary:
            file = f"{temporary}/weights.pt"
            torch.save(named, file)
            self.worker.ask("load", str(folder.resolve()), file, self.sizes)

    def step_seconds(self, _, views: int, side: int, steps: int) -> list[float]:
        """Of every step but the first."""
        return self.worker.ask("step_seconds", views, side, steps, self.sizes["context_dim"])
