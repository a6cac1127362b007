"""Stage 2 of the paper (section 3.3): the view ControlNet F_cam.

F and the trained F_ref are frozen. F_cam starts as a copy of F's encoder half with zero convolutions, and learns to
read the camera, and nothing else, from a portrait of another person at the target view.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset.images import save_sheet
from .engine.command import stage_command
from .objectives.denoising import guided_views
from .reference import ReferenceStage


class ViewControlStage(ReferenceStage):
    """Noise prediction of one view, given a reference view and a camera condition."""

    name = "view_control"
    kind = "view_controlnet"

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
