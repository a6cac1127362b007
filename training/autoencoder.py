"""Stage 0a, miniature only: a small KL-f8 autoencoder (SD1.5 brings its own).

L1 + multi-scale gradients + colours of whole latent cells + a little KL, from start values that already carry colour
(`training.objectives.autoencoder_start`). Most of the run sees random crops, which cost a quarter or less; the last
part sees whole images, since the norms average over the image. At the end the latents' statistics are folded into the
quantisation convolutions: 0.18215 * mode has zero mean and unit std per channel, and the log-variance is a constant
-30, so that hosts which sample the posterior get the mode.

With `decoder_only` a finished autoencoder's decoder is trained on, alone: its latents, and all that was trained on
them, stay valid. That can run beside the later stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffportrait3d.networks import AutoencoderConfig, AutoencoderKL
from diffportrait3d.networks.autoencoder import LATENT_SCALE

from .dataset.images import Batch, encode_all, pick, save_sheet, to_network
from .engine.command import stage_command
from .engine.config import Number, StageConfig
from .engine.stage import NetworkSource, Stage
from .latent_colours import fit_latent_colours
from .objectives.autoencoder_start import carry_colours
from .objectives.losses import gradient_loss, kl_loss, psnr


class AutoencoderStageConfig(StageConfig):
    network: dict = Field({}, description="of AutoencoderConfig")
    crop: int = Field(64, description="pixels; a multiple of the downscale factor")
    whole_from: Number = Field(0.7, description="progress from which whole images are seen")
    whole_batch_size: int = 4
    colour_weight: Number = Field(1.0, description="of the error averaged over latent cells; 0: small runs lose hues")
    decoder_only: bool = Field(False, description="the encoder of inputs.autoencoder, so every latent, stays the same")
    latent_noise: Number = Field(0.03, description="decoder_only: on the unit-std latents; sampled ones have as much")
    gradient_weight: Number = 1.0
    kl_weight: Number = 1e-5
    validation_images: int = 64
    statistics_images: int = Field(512, description="for the normalisation of the latents")


class AutoencoderStage(Stage):
    """Reconstruction of single images."""

    name = "autoencoder"
    kind = "autoencoder"
    config_class = AutoencoderStageConfig

    def build_networks(self, networks: NetworkSource) -> None:
        config = self.config
        if config.decoder_only or config.inputs.autoencoder:
            self.autoencoder = networks("autoencoder")[0]
        else:
            self.autoencoder = well_started(AutoencoderKL(AutoencoderConfig.from_dict(config.network)))
        step = self.autoencoder.config.downscale
        if config.crop % step or not 0 < config.crop <= self.resolution:
            raise ValueError(f"crop must be a multiple of {step} up to {self.resolution} pixels, not {config.crop}.")
        self.trainable = self.autoencoder
        if config.decoder_only:
            self.trainable = part_of(self.autoencoder, "decoder", "post_quant_conv")
            self.frozen["encoder"] = part_of(self.autoencoder, "encoder", "quant_conv")

    @property
    def network(self) -> AutoencoderKL:
        return self.autoencoder

    def dummy_loss(self, samples: int) -> dict[str, Tensor]:
        cropped, whole = (samples, self.config.crop), (min(self.config.whole_batch_size, samples), self.resolution)
        samples, side = max(cropped, whole, key=lambda phase: phase[0] * phase[1] ** 2)  # the larger phase's
        return self.losses(torch.zeros(samples, 3, side, side, device=self.device))

    def variant(self, progress: float) -> str:
        return "whole" if progress >= self.config.whole_from or self.config.crop == self.resolution else "crop"

    def inputs(self, batch: Batch, variant: str) -> dict[str, Tensor]:
        count = self.samples(batch, variant)
        return {"images": pick(self.data.images, batch.targets[:count], batch.flips[:count], self.device)}

    def loss(self, inputs: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
        images = inputs["images"]  # [N, 3, H, W]
        return self.losses(random_crops(images, self.config.crop) if variant == "crop" else images)

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        """Losses of reconstructing images [N, 3, H, W] in [-1, 1]."""
        if self.config.decoder_only:
            with torch.no_grad():
                latents = self.autoencoder.encode(images)  # [N, 4, h, w]
            noisy = latents + self.config.latent_noise * torch.randn_like(latents)
            return self.reconstruction(self.autoencoder.decode(noisy), images)
        mean, logvar = self.autoencoder.moments(images)  # [N, 4, h, w]
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        losses = self.reconstruction(self.autoencoder.decode(LATENT_SCALE * latents), images)
        kl = kl_loss(mean, logvar)
        return {**losses, "loss": losses["loss"] + self.config.kl_weight * kl, "kl": kl}

    def reconstruction(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        """L1, gradient and colour losses and their weighted sum."""
        l1, gradient = F.l1_loss(output, images), gradient_loss(output, images)
        cell = self.autoencoder.config.downscale
        colour = F.l1_loss(F.avg_pool2d(output, cell), F.avg_pool2d(images, cell))
        total = l1 + self.config.gradient_weight * gradient + self.config.colour_weight * colour
        return {"loss": total, "l1": l1, "gradient": gradient, "colour": colour}

    def samples(self, batch: Batch, variant: str) -> int:
        return min(self.config.whole_batch_size, len(batch)) if variant == "whole" else len(batch)

    def validate(self, image: Path) -> dict[str, float]:
        images = self.validation.images[_spread(len(self.validation), self.config.validation_images)]
        outputs, values, spread = [], [], []
        for chunk in images.split(8):
            x = to_network(chunk, self.device)
            mean, logvar = self.autoencoder.moments(x)
            y = self.autoencoder.decode(LATENT_SCALE * mean).clamp(-1, 1)
            values.append(psnr(x, y))
            spread.append((0.5 * logvar).exp().mean() / mean.std())
            outputs.append(y.cpu())
        shown = _spread(len(images), 16)
        x, y = to_network(images[shown]), torch.cat(outputs)[shown]
        save_sheet(image, [row for pair in zip(x.split(8), y.split(8), strict=True) for row in pair])
        return {"psnr": float(torch.cat(values).mean()), "posterior_std": float(torch.stack(spread).mean())}

    def finish(self, run_dir: Path, summary: dict[str, Any]) -> None:
        if not self.config.decoder_only:
            self.normalise()
        super().finish(run_dir, summary)

    def facts(self) -> dict[str, Any]:
        """What previews show of the finished network's latents, fitted to the validation images."""
        images = self.validation.images[_spread(len(self.validation), self.config.validation_images)]
        latents = encode_all(images, self.autoencoder, 8, "latent colours")[0]
        return {"latent_rgb": fit_latent_colours(latents, to_network(images.cpu()))}

    def normalise(self) -> None:
        """Unit latents and a deterministic posterior, from the statistics of training images."""
        images = self.data.images[_spread(len(self.data), self.config.statistics_images)]
        latents = encode_all(images, self.autoencoder, 16, "latent statistics")
        std, mean = torch.std_mean(latents, dim=(0, 1, 3, 4))
        self.autoencoder.normalise(mean.to(self.device), std.to(self.device))
        self.autoencoder.make_deterministic()


def _spread(length: int, count: int) -> Tensor:
    """`count` row numbers spread evenly over `length` rows, all of them if there are fewer."""
    return torch.from_numpy(np.linspace(0, length - 1, min(count, length)).round().astype(int))


def random_crops(images: Tensor, size: int) -> Tensor:
    """A random window of every image, [N, 3, size, size], at positions from torch's global RNG."""
    count, _, height, width = images.shape
    y, x = (
        torch.randint(0, side - size + 1, (count, 1), device=images.device) + torch.arange(size, device=images.device)
        for side in (height, width)
    )  # [N, size]
    image = torch.arange(count, device=images.device)[:, None, None]
    return images[image, :, y[:, :, None], x[:, None, :]].movedim(-1, 1).contiguous()


def part_of(module: nn.Module, *names: str) -> nn.ModuleDict:
    """Some of a network's children as a module of their own (shared, not copied)."""
    return nn.ModuleDict({name: getattr(module, name) for name in names})


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
    carry_colours(autoencoder)
    return autoencoder


if __name__ == "__main__":
    raise SystemExit(stage_command(AutoencoderStage))
