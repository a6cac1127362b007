"""The miniature's networks from a weights folder, and views generated with one part removed at a time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffportrait3d.checkpoints import load_network, network_files
from diffportrait3d.denoiser import Denoiser
from diffportrait3d.diffusion import Schedule, ddim_sample, start_noise, view_noise

from .subjects import Subject

NETWORKS = ("unet", "reference_encoder", "view_controlnet", "view_consistency", "autoencoder", "novel_view")


@dataclass(frozen=True)
class Arm:
    """The full system, or the full system less one part."""

    title: str
    reference: bool = True
    camera: bool = True
    view_consistency: bool = True
    proxy_noise: bool = True


# "No reference" and "no camera" keep S's start noise, which carries a trace of both: one part is removed at a time.
ARMS = {
    "full": Arm("full system"),
    "no_reference": Arm("no reference", reference=False),
    "no_camera": Arm("no camera", camera=False),
    "no_view_consistency": Arm("no view consistency", view_consistency=False),
    "random_noise": Arm("random noise", proxy_noise=False),
}


class Miniature:
    """All networks of a weights folder, in float32 on the CPU.

    Raises CheckpointError (a ValueError) if a network is missing, damaged or of another kind.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.hashes: dict[str, str] = {}
        loaded, metadata = {}, {}
        for name in NETWORKS:
            path = folder / f"{name}.safetensors"
            loaded[name], metadata[name] = load_network(path, expect=name)
            self.hashes |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in network_files(path)}
        self.autoencoder, self.novel_view = loaded["autoencoder"], loaded["novel_view"]
        self.linear_end = metadata["unet"].get("linear_end", 0.012)
        self.schedule = Schedule(linear_end=self.linear_end)
        parts = loaded["unet"], loaded["reference_encoder"], loaded["view_controlnet"]
        timestep = metadata["reference_encoder"].get("reference_timestep", "current")
        self.denoiser = Denoiser(*parts, loaded["view_consistency"], reference_timestep=timestep)
        self.independent = Denoiser(*parts, None, reference_timestep=timestep)
        self.resolution = self.novel_view.config.image_size

    @torch.inference_mode()
    def proxies(self, subject: Subject) -> Tensor:
        """S's views of the subject at the target cameras, [V, 3, H, W] in [0, 1]."""
        count = len(subject.labels)
        source = subject.reference.expand(count, -1, -1, -1) * 2 - 1
        return (self.novel_view(source, subject.reference_label.expand(count, -1), subject.labels) + 1) / 2

    @torch.inference_mode()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Through the autoencoder and back, [V, 3, H, W] in [0, 1]: the best the system could do."""
        return ((self.autoencoder.decode(self.autoencoder.encode(images * 2 - 1)) + 1) / 2).clamp(0, 1)

    @torch.inference_mode()
    def generate(
        self, arm: Arm, subject: Subject, proxies: Tensor, seed: int, steps: int, scale: float, eta: float
    ) -> Tensor:
        """All target views at once, [V, 3, H, W] in [0, 1]. Arms with equal seeds share every drop of noise."""
        count = len(subject.labels)
        proxy_latents = self.autoencoder.encode(proxies * 2 - 1)  # [V, 4, h, w]
        shape = proxy_latents.shape[1:]
        noise = view_noise(seed, range(count), shape)
        x = start_noise(proxy_latents, noise, self.schedule) if arm.proxy_noise else noise
        reference = self.autoencoder.encode(subject.reference * 2 - 1) if arm.reference else None  # [1, 4, h, w]
        hint = subject.conditions * 2 - 1 if arm.camera else None
        denoiser = self.denoiser if arm.view_consistency else self.independent
        context = torch.zeros(count, 1, denoiser.unet.config.context_dim)

        def eps(x: Tensor, t: Tensor) -> Tensor:
            return denoiser.guided(x, t, context, reference, hint, num_views=count, scale=scale)

        def fresh(step: int, _: Tensor) -> Tensor:
            return view_noise(seed, range(count), shape, stream=step + 1)

        x = ddim_sample(eps, x, self.schedule, steps, eta, step_noise=fresh)
        return ((self.autoencoder.decode(x) + 1) / 2).clamp(0, 1)
