"""Whether a MODEL, a VAE and our networks fit each other: their widths and their family."""

from __future__ import annotations

from typing import Any

from torch import nn

from .loading import HostNetwork, host_unet_settings

WIDTHS = ("model_channels", "context_dim", "channel_mult")  # by these settings UNets of the SD1.5 family differ


def check_same_width(model, network: HostNetwork) -> None:
    """Raises ValueError, naming the numbers, unless `network` was made for a UNet of MODEL `model`'s width."""
    _check_widths(model.model, host_unet_settings(network.config), network.name)


def check_control_width(model, module: nn.Module) -> None:
    """Raises ValueError unless the residuals of control model `module` fit the UNet of BaseModel `model`.

    The host logs a residual of another shape and ignores it.
    """
    text = next(layer for name, layer in module.named_modules() if name.endswith("attn2.to_k"))
    needs = {
        "model_channels": module.model_channels,
        "context_dim": text.in_features,
        "channel_mult": list(module.channel_mult),
    }
    _check_widths(model, needs, "The view ControlNet")


def _check_widths(model, needs: dict[str, Any], name: str) -> None:
    """Compares the UNet of BaseModel `model` with the settings that the network called `name` needs."""
    has = model.model_config.unet_config
    if has.get("model_channels") is None:
        raise ValueError(
            f"{type(model).__name__} is not of the SD1.5 family, but {name} works on an SD1.5 UNet; "
            "connect an SD1.5 checkpoint or Load Miniature."
        )
    has = {key: list(value) if isinstance(value, tuple) else value for key, value in has.items()}
    widths = {key: (needs[key], has.get(key)) for key in WIDTHS}
    differing = {key: pair for key, pair in widths.items() if pair[0] != pair[1]}
    if differing:
        needed, found = (", ".join(f"{key} {pair[side]}" for key, pair in differing.items()) for side in (0, 1))
        raise ValueError(
            f"{name} fits a UNet with {needed}, but this MODEL has {found}; load the MODEL and the networks of one set "
            "together."
        )


def check_control_heads(module: nn.Module) -> None:
    """Raises ValueError if the host's ControlNet loader has guessed the attention heads of a control model.

    It knows the 8 heads of SD1.5's own widths. To any other network it gives heads of 64 channels, which is right for
    SD2 and SDXL; one of the SD1.5 kind would run and give wrong residuals.
    """
    if getattr(module, "num_heads", -1) == -1:
        width = getattr(module, "model_channels", None)
        described = type(module).__name__ if width is None else f"ControlNet of {width} channels"
        raise ValueError(
            f"View ControlNet got a {described} with attention heads as in SD2 and SDXL: the host's loader knows those "
            "of SD1.5 at its full width only; load a view ControlNet with Load View ControlNet."
        )


def check_vae(vae, node: str) -> None:
    """Raises ValueError unless `vae` makes latents of the SD1.5 family: images of 4 channels."""
    if vae is None or vae.first_stage_model is None:
        raise ValueError(f"{node} got no VAE: the checkpoint holds none; take one from Load VAE.")
    if (vae.latent_channels, vae.latent_dim) != (4, 2):
        raise ValueError(
            f"{node} got a VAE with latents of {vae.latent_channels} channels in {vae.latent_dim} dimensions, SD1.5's "
            "have 4 in 2; connect the VAE of the base model."
        )
