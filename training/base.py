"""Stage 0b, miniature only: the unconditional latent diffusion model F (SD1.5 brings its own).

It sees single images, no reference and no camera, and predicts their noise; the averaged weights are what is saved.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from torch import Tensor

from diffportrait3d.networks import UNet, UNetConfig

from .dataset.images import Sampler, SingleImages, save_sheet
from .engine.command import stage_command
from .objectives.denoising import DenoisingConfig, DenoisingStage


class BaseConfig(DenoisingConfig):
    network: dict = Field({}, description="of UNetConfig")
    samples: int = Field(16, description="drawn for the validation sheet")


class BaseStage(DenoisingStage):
    """Unconditional noise prediction on cached latents."""

    name = "base"
    kind = "unet"
    config_class = BaseConfig

    def new_network(self) -> UNet:
        return UNet(UNetConfig.from_dict(self.config.network))

    def make_sampler(self) -> Sampler:
        return self.sampler_of(SingleImages)

    def predict(self, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return self.trainable(x, t, self.context(len(x)))

    def validate(self, image: Path) -> dict[str, float]:
        images = self.sample(lambda x, t: self.predict(x, t, {}), self.config.samples)
        save_sheet(image, images.split(8))
        return {"loss": self.validation_loss(self.validation_batch())}


if __name__ == "__main__":
    raise SystemExit(stage_command(BaseStage))
