"""The clean half of 3D-aware noise: proxy views as latents. The sampler adds the noise (see `sampling.DDIMSampler`)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..diffportrait3d.cameras.labels import orbit_camera
from ..host.images import check_images, resize_images
from ..host.loading import check_vae
from ..host.novel_view import render_proxies

NODE = "3D-Aware Noise"
MODES = ("paper", "schedule-matched", "shared", "random")
GREY = 0.5
BURIED = 1000.0  # noise per signal above which proxies are lost; SD1.5 ends at 14.6, zero terminal SNR at thousands


def proxy_images(cameras, novel_view, image, reference_camera, proxies) -> Tensor:
    """Proxy views IMAGE [V, H, W, 3]: the user's own, or S's renders of `image` at `cameras`.

    Args:
        cameras, reference_camera: {"labels": [V, 25]} or None.
        novel_view: network S or None. image: the portrait or None. proxies: IMAGE or None.

    Raises:
        ValueError: neither or both of the two ways are complete, counts differ, or pictures with NaN.
    """
    if proxies is not None:
        if novel_view is not None:
            raise ValueError(f"{NODE} got proxies and a novel-view model; connect one of them.")
        if cameras is not None and len(cameras["labels"]) != proxies.shape[0]:
            raise ValueError(f"{proxies.shape[0]} proxies for {len(cameras['labels'])} cameras; give one per camera.")
        check_images(proxies, NODE, "proxies")
        return proxies[..., :3]
    given = {"novel_view": novel_view, "image": image, "cameras": cameras}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"{NODE} lacks {', '.join(missing)}; connect novel_view, image and cameras, or proxies of your own."
        )
    check_images(image, NODE, "image")
    reference = orbit_camera(0.0, 0.0)[None] if reference_camera is None else reference_camera["labels"]
    for name, count in (("image", len(image)), ("reference_camera", len(reference))):
        if count != 1:
            raise ValueError(f"{NODE}: the novel-view model reads one portrait; {name} has {count}, choose one.")
    return render_proxies(novel_view, image, reference[0], cameras["labels"])


def proxy_latents(vae, images: Tensor, resolution: int) -> tuple[dict, Tensor]:
    """(LATENT, IMAGE): the proxies at the views' resolution, encoded and as they were encoded."""
    check_vae(vae, NODE)
    images = resize_images(images, resolution, resolution)
    return {"samples": vae.encode(images)}, images


def empty_views(vae, cameras, proxies, resolution: int) -> tuple[dict, Tensor]:
    """(LATENT, IMAGE): nothing to start from, one entry per camera or proxy, and grey pictures of it.

    Raises:
        ValueError: neither cameras nor proxies say how many views there are.
    """
    check_vae(vae, NODE)
    if cameras is None and proxies is None:
        raise ValueError(f"{NODE} lacks cameras; connect them to say how many views to make.")
    count = len(proxies if cameras is None else cameras["labels"])
    side = resolution // vae.spacial_compression_encode()
    images = torch.full((count, resolution, resolution, 3), GREY)
    return {"samples": torch.zeros(count, vae.latent_channels, side, side)}, images


def warn_of_zero_terminal_snr(model_sampling) -> None:
    """One warning if the model's last timestep leaves nothing of the proxy views."""
    sigma = float(model_sampling.sigma_max)
    if sigma > BURIED:
        logging.warning(
            "3D-aware noise: this model has zero terminal SNR (sigma %.0f at its last timestep), where nothing is left "
            "of the proxy views; use mode schedule-matched with a start below it, or a model without it.",
            sigma,
        )
