"""Stage 2 of the paper (section 3.3): the view ControlNet F_cam.

F and the trained F_ref are frozen. F_cam starts as a copy of F's encoder half with zero convolutions, and learns to
read the camera, and nothing else, from a portrait of another person at the target view.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffportrait3d.command import run_main
from diffportrait3d.denoiser import Denoiser
from diffportrait3d.networks import ViewControlNet
from diffportrait3d.weights.files import save_network

from .dataset.images import Sampler, ViewGroups
from .dataset.sheets import save_grid
from .engine.config import to_dict
from .engine.loop import stage_main
from .objectives.denoising import DenoisingConfig, DenoisingStage, NetworkSource, Openings, guided_views, schedule_of


@dataclass
class ViewControlConfig(DenoisingConfig):
    """Settings of ``training.view_control``. ``loop.batch_size`` counts references."""

    targets_per_reference: int = 1  # views that share one pass of F_ref, and so its timestep


class ViewControlStage(DenoisingStage):
    """Noise prediction of one view, given a reference view and a camera condition."""

    name = "view_control"
    uses_references = True
    uses_conditions = True

    def build_networks(self, source: NetworkSource) -> None:
        unet, metadata = source("unet")
        reference, reference_metadata = source("reference_encoder")
        config = self.config
        config.reference_timestep = reference_metadata.get("reference_timestep", config.reference_timestep)
        self.schedule, self.sharing = schedule_of(metadata), config.targets_per_reference
        if config.inputs.view_controlnet:
            self.trainable, _ = source("view_controlnet")
        else:
            self.trainable = ViewControlNet(unet.config)
            self.trainable.load_from_unet(unet.state_dict())
        self.frozen |= {"unet": unet.to(self.device), "reference_encoder": reference.to(self.device)}
        self.denoiser = Denoiser(unet, reference, self.trainable, reference_timestep=config.reference_timestep)

    def make_sampler(self) -> Sampler:
        loop = self.config.loop
        return ViewGroups(self.data, loop.batch_size, self.sharing, loop.seed, self.config.data.flip)

    def predict(self, x: Tensor, t: Tensor, openings: Openings) -> Tensor:
        with torch.no_grad():
            bank = self.bank(openings.references, t)
        context = self.context(len(x))
        return self.denoiser.conditional(x, t, context, bank, openings.hints)

    def validate(self, picture: Path) -> dict[str, float]:
        batch = self.validation_batch()
        references, targets = self.pictures(batch)
        save_grid(picture, [references, self.hints(batch, self.validation), targets, guided_views(self, batch)])
        return {"loss": self.validation_loss(batch)}

    def finish(self, run_dir: Path, summary: dict[str, Any]) -> None:
        save_network(
            run_dir / "view_controlnet.safetensors",
            self.trainable,
            "view_controlnet",
            hint_range=[-1, 1],
            reference_timestep=self.config.reference_timestep,
            linear_end=self.schedule.linear_end,
            image_size=self.data.resolution,
            training={**summary, "config": to_dict(self.config)},
        )


build = ViewControlStage


def main(argv: list[str] | None = None) -> int:
    return stage_main(ViewControlStage, ViewControlConfig, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
