"""Stage 1 of the paper (section 3.2): the appearance reference encoder F_ref.

F is frozen. F_ref starts as a copy of F and learns to read one view of a person so that F, through its self-attention,
denoises another view of the same person. There is no camera yet; the reference latent is clean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffportrait3d.command import run_main
from diffportrait3d.denoiser import Denoiser
from diffportrait3d.networks import ReferenceEncoder
from diffportrait3d.weights.files import save_network

from .dataset.images import Sampler, ViewGroups
from .dataset.sheets import save_grid
from .engine.config import to_dict
from .engine.loop import stage_main
from .objectives.denoising import DenoisingConfig, DenoisingStage, NetworkSource, Openings, schedule_of


@dataclass
class ReferenceConfig(DenoisingConfig):
    """Settings of ``training.reference``. ``loop.batch_size`` counts references."""

    targets_per_reference: int = 1  # views that share one pass of F_ref, and so its timestep


class ReferenceStage(DenoisingStage):
    """Noise prediction of one view, given another view of the same subject."""

    name = "reference"
    uses_references = True

    def build_networks(self, source: NetworkSource) -> None:
        unet, metadata = source("unet")
        self.schedule = schedule_of(metadata)
        self.sharing = self.config.targets_per_reference
        if self.config.inputs.reference_encoder:
            self.trainable, _ = source("reference_encoder")
        else:
            self.trainable = ReferenceEncoder(unet.config)
            self.trainable.load_from_unet(unet.state_dict())
        self.frozen["unet"] = unet.to(self.device)
        self.denoiser = Denoiser(unet, self.trainable, reference_timestep=self.config.reference_timestep)

    def make_sampler(self) -> Sampler:
        loop = self.config.loop
        return ViewGroups(self.data, loop.batch_size, self.sharing, loop.seed, self.config.data.flip)

    def predict(self, x: Tensor, t: Tensor, openings: Openings) -> Tensor:
        bank = self.bank(openings.references, t)
        return self.denoiser.unet(x, t, self.context(len(x)), bank=bank)

    def validate(self, picture: Path) -> dict[str, float]:
        batch = self.validation_batch()
        context = self.context(len(batch))
        z_ref = self.reference_latents(batch, self.validation_latents)

        def eps(x: Tensor, t: Tensor) -> Tensor:
            return self.denoiser.unet(x, t, context, bank=self.references(z_ref, t))

        references, targets = self.pictures(batch)
        save_grid(picture, [references, targets, self.sample(eps, len(batch))])
        return {"loss": self.validation_loss(batch)}

    def finish(self, run_dir: Path, summary: dict[str, Any]) -> None:
        save_network(
            run_dir / "reference_encoder.safetensors",
            self.trainable,
            "reference_encoder",
            reference_timestep=self.config.reference_timestep,
            linear_end=self.schedule.linear_end,
            image_size=self.data.resolution,
            training={**summary, "config": to_dict(self.config)},
        )


build = ReferenceStage


def main(argv: list[str] | None = None) -> int:
    return stage_main(ReferenceStage, ReferenceConfig, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
