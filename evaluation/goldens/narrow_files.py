"""A complete set of narrow network files, as training leaves it: the method's whole structure, a run in a blink."""

from __future__ import annotations

from pathlib import Path

import torch

from diffportrait3d.networks import AutoencoderConfig, AutoencoderKL, UNetConfig
from diffportrait3d.networks.novel_view import NovelViewConfig, NovelViewModel
from diffportrait3d.weights.files import save_network

from .core import NETWORKS
from .host import NARROW_CONFIG, known_weights

_SMALL_S = NovelViewConfig(
    image_size=32,
    render_size=8,
    base_channels=32,
    feature_channels=8,
    volume_size=4,
    volume_channels=8,
    prior_channels=4,
    samples_per_ray=4,
)


def write_networks(folder: Path, scale: float = 1.0, config: UNetConfig = NARROW_CONFIG, **metadata) -> None:
    """Writes UNet, F_ref, F_cam, view consistency, autoencoder and S into `folder`.

    Args:
        scale: factor on the known weights; with another one the set gives other views.
        config: of the networks made like the UNet.
        metadata: for the files of the networks around the UNet; the autoencoder's gets the image size of it.
    """
    for kind, weights in known_weights(config).items():
        network = NETWORKS[kind](config)
        network.load_state_dict({name: scale * tensor for name, tensor in weights.items()})
        save_network(folder / f"{kind}.safetensors", network, kind, torch.float16, **metadata)
    torch.manual_seed(0)
    about = {name: value for name, value in metadata.items() if name == "image_size"}
    save_network(folder / "autoencoder.safetensors", AutoencoderKL(AutoencoderConfig(ch=32)), "autoencoder", **about)
    save_network(folder / "novel_view.safetensors", NovelViewModel(_SMALL_S), "novel_view")
