"""Stage 0b, miniature only: the unconditional latent diffusion model F (SD1.5 brings its own).

It sees single images, no reference and no camera, and predicts their noise; the averaged weights are what is saved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from diffportrait3d.command import run_main
from diffportrait3d.denoiser import Denoiser
from diffportrait3d.diffusion import Schedule
from diffportrait3d.networks import UNet, UNetConfig
from diffportrait3d.weights.files import save_network

from .dataset.images import Sampler, SingleImages
from .dataset.sheets import save_grid
from .engine.config import to_dict
from .engine.loop import stage_main
from .objectives.denoising import DenoisingConfig, DenoisingStage, NetworkSource, Openings


@dataclass
class BaseConfig(DenoisingConfig):
    """Settings of ``training.base``."""

    network: dict = field(default_factory=dict)  # of UNetConfig
    samples: int = 16  # drawn for the validation grid


class BaseStage(DenoisingStage):
    """Unconditional noise prediction on cached latents."""

    name = "base"

    def build_networks(self, source: NetworkSource) -> None:
        self.schedule = Schedule(linear_end=self.config.linear_end)
        new = not self.config.inputs.unet
        self.trainable = UNet(UNetConfig.from_dict(self.config.network)) if new else source("unet")[0]
        self.denoiser = Denoiser(self.trainable)

    def make_sampler(self) -> Sampler:
        loop = self.config.loop
        return SingleImages(self.data, loop.batch_size, loop.seed, self.config.data.flip)

    def predict(self, x: Tensor, t: Tensor, openings: Openings) -> Tensor:
        return self.trainable(x, t, self.context(len(x)))

    def validate(self, picture: Path) -> dict[str, float]:
        def eps(x: Tensor, t: Tensor) -> Tensor:
            return self.trainable(x, t, self.context(len(x)))

        images = self.sample(eps, self.config.samples)
        save_grid(picture, images.split(8))
        return {"loss": self.validation_loss(self.validation_batch())}

    def finish(self, run_dir: Path, summary: dict[str, Any]) -> None:
        save_network(
            run_dir / "unet.safetensors",
            self.trainable,
            "unet",
            linear_end=self.schedule.linear_end,
            image_size=self.data.resolution,
            training={**summary, "config": to_dict(self.config)},
        )


build = BaseStage


def main(argv: list[str] | None = None) -> int:
    return stage_main(BaseStage, BaseConfig, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
