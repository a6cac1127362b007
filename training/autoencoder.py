"""Stage 0a, miniature only: a small KL-f8 autoencoder (SD1.5 brings its own).

L1 + multi-scale gradients + a little KL. Most of the run sees random crops, which cost a quarter or less; the last
part sees whole images, since the norms average over the picture. At the end the latents' statistics are folded into
the quantisation convolutions: 0.18215 * mode has zero mean and unit std per channel, and the log-variance is a
constant -30, so that hosts which sample the posterior get the mode.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffportrait3d.checkpoints import save_network
from diffportrait3d.networks import AutoencoderConfig, AutoencoderKL
from diffportrait3d.networks.autoencoder import LATENT_SCALE

from .config import StageConfig, parse_arguments, to_dict
from .data import Batch, MultiViewDataset, SingleImages, encode_all, pick, to_network
from .loop import Stage, stage_main
from .losses import gradient_loss, kl_loss, psnr
from .pictures import save_grid


@dataclass
class AutoencoderStageConfig(StageConfig):
    """Settings of ``training.autoencoder``."""

    network: dict = field(default_factory=dict)  # of AutoencoderConfig
    crop: int = 64  # pixels; a multiple of the downscale factor
    whole_from: float = 0.7  # progress from which whole images are seen
    whole_batch_size: int = 4
    gradient_weight: float = 1.0
    kl_weight: float = 1e-5
    validation_images: int = 64
    statistics_images: int = 512  # for the normalisation of the latents


class AutoencoderStage(Stage):
    """Reconstruction of single images."""

    name = "autoencoder"

    def __init__(self, config: AutoencoderStageConfig, device: torch.device):
        self.config, self.device = config, device
        self.data = MultiViewDataset(config.data.root, config.data.split, conditions=False)
        self.validation = MultiViewDataset(config.data.root, config.data.validation_split, conditions=False)
        network = AutoencoderConfig.from_dict(config.network)
        if config.crop % network.downscale or not 0 < config.crop <= self.data.resolution:
            raise ValueError(
                f"crop must be a multiple of {network.downscale} up to {self.data.resolution} pixels, "
                f"not {config.crop}."
            )
        self.trainable = well_started(AutoencoderKL(network))
        self.frozen = {}
        self.sampler = SingleImages(self.data, config.loop.batch_size, config.loop.seed, config.data.flip)
        self.whole = False

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        self.whole = progress >= self.config.whole_from or self.config.crop == self.data.resolution
        count = min(self.config.whole_batch_size, len(batch)) if self.whole else len(batch)
        rows, flips = batch.targets[:count], batch.flips[:count]
        images = pick(self.data.images, rows, flips, self.device)  # [N, 3, H, W]
        if not self.whole:
            images = random_crops(images, self.config.crop)
        mean, logvar = self.trainable.moments(images)  # [N, 4, h, w]
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        output = self.trainable.decode(LATENT_SCALE * latents)
        reconstruction, gradient = F.l1_loss(output, images), gradient_loss(output, images)
        kl = kl_loss(mean, logvar)
        total = reconstruction + self.config.gradient_weight * gradient + self.config.kl_weight * kl
        return {"loss": total, "l1": reconstruction, "gradient": gradient, "kl": kl}

    def samples(self, batch: Batch) -> int:
        return min(self.config.whole_batch_size, len(batch)) if self.whole else len(batch)

    def validate(self, picture: Path) -> dict[str, float]:
        rows = np.linspace(0, len(self.validation) - 1, min(self.config.validation_images, len(self.validation)))
        images = self.validation.images[torch.from_numpy(rows.round().astype(int))]
        outputs, values, spread = [], [], []
        for chunk in images.split(8):
            x = to_network(chunk, self.device)
            mean, logvar = self.trainable.moments(x)
            y = self.trainable.decode(LATENT_SCALE * mean).clamp(-1, 1)
            values.append(psnr(x, y))
            spread.append((0.5 * logvar).exp().mean() / mean.std())
            outputs.append(y.cpu())
        y = torch.cat(outputs)[:: max(1, len(images) // 16)][:16]
        x = to_network(images[:: max(1, len(images) // 16)][:16])
        save_grid(picture, [x[:8], y[:8], x[8:], y[8:]] if len(x) > 8 else [x, y])
        return {"psnr": float(torch.cat(values).mean()), "posterior_std": float(torch.stack(spread).mean())}

    def finish(self, run_dir: Path, summary: dict[str, Any]) -> None:
        rows = (
            np.linspace(0, len(self.data) - 1, min(self.config.statistics_images, len(self.data))).round().astype(int)
        )
        latents = encode_all(self.data.images[torch.from_numpy(rows)], self.trainable, 16, "latent statistics")
        std, mean = torch.std_mean(latents, dim=(0, 1, 3, 4))
        self.trainable.normalise(mean.to(self.device), std.to(self.device))
        self.trainable.make_deterministic()
        save_network(
            run_dir / "autoencoder.safetensors",
            self.trainable,
            "autoencoder",
            image_size=self.data.resolution,
            training={**summary, "config": to_dict(self.config)},
        )


def random_crops(images: Tensor, size: int) -> Tensor:
    """A random window of every image, [N, 3, size, size], at positions from torch's global RNG."""
    count, _, height, width = images.shape
    top = torch.randint(0, height - size + 1, (count,)).tolist()
    left = torch.randint(0, width - size + 1, (count,)).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, y, x in zip(images, top, left, strict=True)])


def well_started(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """Start values that save a small budget many steps.

    The last layer of every residual branch is zero, so that training starts from the plain chain of resampling layers;
    the posterior starts narrow, so that the decoder first sees the latents and not noise.
    """
    for name, layer in autoencoder.named_modules():
        if name.endswith((".conv2", ".proj_out")):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    channels = autoencoder.config.z_channels
    nn.init.constant_(autoencoder.quant_conv.bias[channels:], -6.0)
    return autoencoder


def build(config: AutoencoderStageConfig, device: torch.device) -> AutoencoderStage:
    return AutoencoderStage(config, device)


def main(argv: list[str] | None = None) -> int:
    return stage_main(build, parse_arguments(AutoencoderStageConfig, __doc__, argv))


if __name__ == "__main__":
    raise SystemExit(main())
