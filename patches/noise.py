"""3D-aware noise: proxy views as latents, and noise that belongs to views, for the start and for every step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..diffportrait3d.cameras.labels import orbit_camera
from ..diffportrait3d.choices import check_choice
from ..diffportrait3d.diffusion import view_noise
from ..host.compatibility import check_vae
from ..host.images import check_images, resize_images
from ..host.novel_view import render_proxies
from .view_memory import View, note_noise

NODE = "3D-Aware Noise"
MODES = ("paper", "schedule-matched", "shared", "random", "portrait")
GREY = 0.5
MAX_START_SIGMA = 1000.0  # above it nothing is left of the proxies; SD1.5 ends at 14.6, zero terminal SNR at thousands

StepNoise = Callable[[int, Tensor], Tensor]


def proxy_images(cameras, novel_view, image, reference_camera, proxies) -> Tensor:
    """Proxy views IMAGE [V, H, W, 3]: the user's own, or S's renders of `image` at `cameras`.

    Args:
        cameras, reference_camera: {"labels": [V, 25]} or None.
        novel_view: network S or None. image: the portrait or None. proxies: IMAGE or None.

    Raises:
        ValueError: neither or both of the two ways are complete, counts differ, or images with NaN.
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


def repeated_portrait(cameras, image) -> Tensor:
    """The portrait in the place of every proxy, as the release does where it has none: IMAGE [V, H, W, 3].

    Raises:
        ValueError: no cameras to say how many views there are, or not one portrait.
    """
    missing = [name for name, value in (("cameras", cameras), ("image", image)) if value is None]
    if missing:
        raise ValueError(f"{NODE} lacks {' and '.join(missing)}, which mode portrait needs; connect them.")
    if len(image) != 1:
        raise ValueError(f"{NODE}: mode portrait takes one portrait; image has {len(image)}, choose one.")
    return image[..., :3].expand(len(cameras["labels"]), -1, -1, -1)


def empty_views(vae, cameras, proxies, resolution: int) -> tuple[dict, Tensor]:
    """(LATENT, IMAGE): nothing to start from, one entry per camera or proxy, and grey images.

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
    if sigma > MAX_START_SIGMA:
        logging.warning(
            "3D-aware noise: this model has zero terminal SNR (sigma %.0f at its last timestep), where nothing is left "
            "of the proxy views; use mode schedule-matched with a start below it, or a model without it.",
            sigma,
        )


class ViewNoise:
    """NOISE for the host's samplers: view i's noise depends on (seed, i) alone, not on its batch.

    Args:
        mode: one of `MODES`. "shared" gives every view the noise of view 0; "schedule-matched" makes
            View-Consistency Sampler diffuse to the first step's noise level, whatever start it is set to.
    """

    def __init__(self, seed: int, mode: str = "paper"):
        check_choice("mode", mode, MODES)
        self.seed, self.mode = seed, mode
        self.start = "schedule" if mode == "schedule-matched" else None  # what it asks of the sampler

    def generate_noise(self, latent: dict) -> Tensor:
        samples, indices = latent["samples"], view_indices(latent)
        drawn = [0] * len(indices) if self.mode == "shared" else indices
        noise = view_noise(self.seed, drawn, samples.shape[1:]).to(samples.dtype)
        note_noise(noise, indices)
        return noise


class NoNoise:
    """NOISE for a run that continues another one: zeros, and a seed for the steps."""

    def __init__(self, seed: int):
        self.seed = seed

    def generate_noise(self, latent: dict) -> Tensor:
        return torch.zeros_like(latent["samples"], device="cpu")


def view_indices(latent: dict) -> list[int]:
    """Numbers of the views in a LATENT: its batch_index if it is a part of a batch."""
    return list(latent.get("batch_index") or range(latent["samples"].shape[0]))


def step_noise_of(views: Sequence[View]) -> StepNoise:
    """Noise of step k for every view, from the same (seed, number) streams as the start noise."""

    def draw(step: int, x: Tensor) -> Tensor:
        drawn = [view_noise(view.seed, [view.number], x.shape[1:], stream=step + 1) for view in views]
        return torch.cat(drawn).to(x, non_blocking=True)  # else a GPU would have to end its work first

    return draw
