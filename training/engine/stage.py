"""What one training script gives to the loop (`training.engine.loop`): networks, batches, a loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from diffportrait3d.networks import set_checkpointing
from diffportrait3d.weights.files import save_network

from ..dataset.images import MultiViewDataset, Sampler, SingleImages
from .config import StageConfig, to_dict
from .inputs import InputNetworks


class NetworkSource(Protocol):
    """Where networks come from: files (`engine.inputs.InputNetworks`), or a plan's, which have no weights."""

    weights: bool

    def __call__(self, kind: str) -> tuple[nn.Module, dict[str, Any]]:
        """The network of a kind and its metadata."""

    def prompt(self, context_dim: int) -> Tensor:
        """The empty prompt [1, L, context_dim]."""


class Stage:
    """What one training script gives to the loop. Subclasses set the class attributes and fill in the methods.

    Args:
        networks: gives networks by their kind.
        resolution: of the images, in pixels.

    Attributes:
        name: the stage's name, also its script's and its summary's.
        kind: the kind of network it trains and writes; `NETWORKS` says which it builds on.
        config_class: its settings.
        full_precision: frozen networks that always stay in float32.
        trainable: the one module whose parameters are trained.
        frozen: networks that take part but must not change.
        data, validation: the dataset's two splits, from `open_data` on.
        sampler: yields batches by `next()`; its position is `state_dict()` / `load_state_dict()`. From `open_data` on.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    config_class: ClassVar[type[StageConfig]] = StageConfig
    full_precision = ("autoencoder",)

    trainable: nn.Module
    frozen: dict[str, nn.Module]
    sampler: Any

    def __init__(self, config: StageConfig, device: torch.device, networks: NetworkSource, resolution: int):
        self.config, self.device, self.resolution, self.frozen = config, device, resolution, {}
        self.build_networks(networks)

    @classmethod
    def build(cls, config: StageConfig, device: torch.device) -> Stage:
        """The stage with networks from the files in `config.inputs`, and its data."""
        store = device if config.data.on_device else "cpu"
        data, validation = (
            MultiViewDataset(config.data.root, split, store, config.data.in_memory)
            for split in (config.data.split, config.data.validation_split)
        )
        stage = cls(config, device, InputNetworks(config.inputs), data.resolution)
        stage.open_data(data, validation)
        return stage

    def build_networks(self, networks: NetworkSource) -> None:
        """Set `trainable`, and the networks in `frozen`."""
        raise NotImplementedError

    def trained_network(self, networks: NetworkSource, new: Callable[[], nn.Module]) -> nn.Module:
        """The network to train: that of the stage's own kind in `config.inputs`, else a new one."""
        return networks(self.kind)[0] if getattr(self.config.inputs, self.kind) else new()

    def freeze(self, checkpointing: bool) -> None:
        """Frozen networks in eval mode without gradients, the trained one in train mode."""
        for module in self.frozen.values():
            module.eval().requires_grad_(False)
        self.trainable.train().requires_grad_(True)
        for module in (self.trainable, *self.frozen.values()):
            set_checkpointing(module, checkpointing)

    def open_data(self, data: MultiViewDataset, validation: MultiViewDataset) -> None:
        """Take the data and make `sampler`."""
        self.data, self.validation = data, validation
        self.sampler = self.make_sampler()

    def make_sampler(self) -> Sampler:
        """The training batches."""
        return self.sampler_of(SingleImages)

    def sampler_of(self, kind: Callable[..., Sampler], **options: Any) -> Sampler:
        """A sampler of this class with the settings that all have."""
        loop = self.config.loop
        return kind(self.data, loop.batch_size, seed=loop.seed, flip=self.config.data.flip, **options)

    def variant(self, progress: float) -> str:
        """Which form the next batch's step takes, where a stage has several; asked before the batch is drawn."""
        return ""

    def inputs(self, batch: Any, variant: str) -> dict[str, Tensor]:
        """What `loss` reads of a batch, on the device; the host does not wait for it."""
        raise NotImplementedError

    def loss(self, inputs: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
        """Losses of a batch's `inputs`; the entry "loss" is minimised, all are logged.

        Everything happens on the device, its random numbers are those of torch's global generator there, and nothing
        is read back: the work may be recorded once, and then runs again on other inputs.
        """
        raise NotImplementedError

    def dummy_loss(self, samples: int) -> dict[str, Tensor]:
        """Losses of a made-up batch: the same work as a real one of so many samples, without its values."""
        raise NotImplementedError

    def samples(self, batch: Any, variant: str) -> int:
        """Number of training images in a batch."""
        return len(batch)

    def validate(self, image: Path) -> dict[str, float]:
        """Numbers to log; writes a contact sheet to `image`. Runs on the averaged weights under `no_grad`."""
        return {}

    @property
    def network(self) -> nn.Module:
        """What is written at the end."""
        return self.trainable

    def facts(self) -> dict[str, Any]:
        """The network's metadata besides its training."""
        return {}

    def finish(self, run_dir: Path, summary: dict[str, Any]) -> None:
        """Write the trained network (averaged weights are in place)."""
        training = {**summary, "config": to_dict(self.config)}
        path = run_dir / f"{self.kind}.safetensors"
        save_network(path, self.network, self.kind, **self.facts(), image_size=self.resolution, training=training)
