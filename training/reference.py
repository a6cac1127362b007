"""Stage 1 of the paper (section 3.2): the appearance reference encoder F_ref.

F is frozen. F_ref starts as a copy of F and learns to read one view of a person so that F, through its self-attention,
denoises another view of the same person. There is no camera yet; the reference latent is clean.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from torch import Tensor

from .dataset.images import save_sheet
from .engine.command import stage_command
from .objectives.denoising import DenoisingConfig, DenoisingStage


class ReferenceConfig(DenoisingConfig):
    """Settings of `training.reference`. `loop.batch_size` counts references."""

    targets_per_reference: int = Field(1, description="views that share one pass of F_ref, and so its timestep")


class ReferenceStage(DenoisingStage):
    """Noise prediction of one view, given another view of the same subject."""

    name = "reference"
    kind = "reference_encoder"
    config_class = ReferenceConfig

    @property
    def views_per_timestep(self) -> int:
        return self.config.targets_per_reference

    def predict(self, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        bank = self.bank(inputs["references"], t)
        return self.denoiser.unet(x, t, self.context(len(x)), bank=bank)

    def validate(self, image: Path) -> dict[str, float]:
        batch = self.validation_batch()
        references, targets = self.images(batch)
        inputs = self.denoiser_inputs(batch, self.validation, self.validation_latents)
        views = self.sample(lambda x, t: self.predict(x, t, inputs), len(batch))
        save_sheet(image, [references, targets, views])
        return {"loss": self.validation_loss(batch)}


if __name__ == "__main__":
    raise SystemExit(stage_command(ReferenceStage))
