"""All kinds of networks: their classes, what their training builds on, and how files name and mark them.

A file of this pack says its kind in its metadata. Files of others are recognised by their keys: the authors'
checkpoint, networks cut out of it, and SD1.5's checkpoints and ControlNets, which keep a network under a prefix.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .autoencoder import AutoencoderKL
from .config import AutoencoderConfig, NetworkConfig, UNetConfig
from .cross_view_attention import CrossViewAttention
from .novel_view import NovelViewConfig, NovelViewModel
from .reference_encoder import ReferenceEncoder
from .unet import UNet
from .view_controlnet import ViewControlNet

VIEW_MODULES = "motion_module."  # in every key of the cross-view attention and in no other network's


@dataclass(frozen=True)
class NetworkSpec:
    """One kind of network.

    Attributes:
        kind: its name in metadata, file names and settings.
        title: its name in sentences.
        module, config: its classes.
        needs: kinds of the trained networks that its training builds on.
        prefix: of its keys in the authors' checkpoint, which holds SD1.5 as well; empty for networks that it lacks.
        sd15_prefix: of its keys in SD1.5 checkpoints or ControlNets of others; empty for networks that these lack.
        signature: the key, without prefix, by which such files are recognised.
        foreign: keys that it cannot have, without prefix: networks with one of them are others of the same topology.
        unused: beginning of the keys of layers that the authors' class has and never calls.
        conventions: of the authors' weights, where tensors do not show them; metadata in converted files. Empty for
            networks that are not the authors'.
    """

    kind: str
    title: str
    module: type[nn.Module]
    config: type[NetworkConfig]
    needs: tuple[str, ...] = ()
    prefix: str = ""
    sd15_prefix: str = ""
    signature: str = ""
    foreign: tuple[str, ...] = ()
    unused: str = ""
    conventions: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def official(self) -> bool:
        """Whether the authors have trained and published it."""
        return bool(self.conventions)

    @property
    def file_name(self) -> str:
        return f"{self.kind}.safetensors"

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """The network of a config as `NetworkConfig.to_dict` gives it, untrained.

        Raises:
            ValueError: a setting that the config does not have, or a value that it cannot have.
        """
        return self.module(self.config.from_dict(dict(config)))

    def shapes(self, config: NetworkConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its tensors, none of which is allocated."""
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in self.module(config).state_dict().items()}

    def owns(self, key: str, prefix: str | None = None) -> bool:
        """Whether a key of a checkpoint is this network's; `prefix` None is the authors'."""
        prefix = self.prefix if prefix is None else prefix
        return key.startswith(prefix) and (VIEW_MODULES in key) == (self.module is CrossViewAttention)

    def is_signed(self, keys: Container[str], prefix: str) -> bool:
        """Whether the keys of a file have this network's signature under `prefix`, and no foreign key."""
        return prefix + self.signature in keys and not any(prefix + key in keys for key in self.foreign)


NETWORKS: dict[str, NetworkSpec] = {
    spec.kind: spec
    for spec in (
        NetworkSpec(
            kind="autoencoder",
            title="autoencoder",
            module=AutoencoderKL,
            config=AutoencoderConfig,
            prefix="first_stage_model.",
            sd15_prefix="first_stage_model.",
            signature="decoder.conv_in.weight",
        ),
        NetworkSpec(
            kind="unet",
            title="base UNet",
            module=UNet,
            config=UNetConfig,
            needs=("autoencoder",),
            prefix="model.diffusion_model.",
            sd15_prefix="model.diffusion_model.",
            signature="out.2.weight",
        ),
        NetworkSpec(
            kind="reference_encoder",
            title="reference encoder",
            module=ReferenceEncoder,
            config=UNetConfig,
            needs=("autoencoder", "unet"),
            prefix="control_model.",
            signature="output_blocks.0.0.in_layers.0.weight",
            foreign=("out.2.weight", "label_emb.0.0.weight"),
            unused="input_hint_block.",
            conventions={"reference_timestep": "current"},
        ),
        NetworkSpec(
            kind="view_controlnet",
            title="view ControlNet",
            module=ViewControlNet,
            config=UNetConfig,
            needs=("autoencoder", "unet", "reference_encoder"),
            prefix="pose_control_model.",
            sd15_prefix="control_model.",
            signature="zero_convs.0.0.weight",
            conventions={"hint_range": [-1, 1]},
        ),
        NetworkSpec(
            kind="view_consistency",
            title="view consistency",
            module=CrossViewAttention,
            config=UNetConfig,
            needs=("autoencoder", "unet", "reference_encoder", "view_controlnet"),
            prefix="model.diffusion_model.",
            signature="input_blocks_motion_module.0.0.temporal_transformer.norm.weight",
            conventions={"middle_view_attention": "unconditional", "trained_views": 8},
        ),
        NetworkSpec(
            kind="novel_view",
            title="novel-view model",
            module=NovelViewModel,
            config=NovelViewConfig,
            needs=("autoencoder",),
        ),
    )
}


def title_of(kind: str) -> str:
    """A kind's name in sentences; of a kind that a file names and nobody here knows, the kind itself."""
    return NETWORKS[kind].title if kind in NETWORKS else kind
