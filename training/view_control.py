"""Stage 2 of the paper (section 3.3): the view ControlNet F_cam.

F and the trained F_ref are frozen. F_cam starts as a copy of F's encoder half with zero convolutions, and learns to
read the camera, and nothing else, from a portrait of another person at the target view.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffportrait3d.denoiser import Denoiser
from diffportrait3d.networks import ViewControlNet

from .dataset.images import save_sheet
from .engine.command import stage_command
from .engine.stage import NetworkSource
from .objectives.denoising import DenoisingStage, copy_of, guided_views, schedule_of
from .reference import ReferenceConfig


class ViewControlStage(DenoisingStage):
    """Noise prediction of one view, given a reference view and a camera condition."""

    name = "view_control"
    kind = "view_controlnet"
    config_class = ReferenceConfig
    uses_references = True
    uses_camera_images = True

    def build_denoiser(self, networks: NetworkSource) -> None:
        unet, metadata = networks("unet")
        reference, reference_metadata = networks("reference_encoder")
        self.reference_timestep = reference_metadata.get("reference_timestep", self.reference_timestep)
        self.schedule, self.views_per_timestep = schedule_of(metadata), self.config.targets_per_reference
        self.trainable = self.trained_network(networks, lambda: copy_of(unet, ViewControlNet))
        self.frozen |= {"unet": unet, "reference_encoder": reference}
        self.denoiser = Denoiser(unet, reference, self.trainable, reference_timestep=self.reference_timestep)

    def predict(self, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            bank = self.bank(inputs["references"], t)
        context = self.context(len(x))
        return self.denoiser.conditional(x, t, context, bank, inputs["camera_images"])

    def validate(self, image: Path) -> dict[str, float]:
        batch = self.validation_batch()
        references, targets = self.images(batch)
        save_sheet(image, [references, self.camera_images(batch, self.validation), targets, guided_views(self, batch)])
        return {"loss": self.validation_loss(batch)}

    def facts(self) -> dict[str, Any]:
        return {"hint_range": [-1, 1], **super().facts()}


if __name__ == "__main__":
    raise SystemExit(stage_command(ViewControlStage))
