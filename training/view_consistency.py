"""Stage 3 of the paper (section 3.3): attention across views.

Everything else is frozen. A sample is a group of V shuffled views of one person, so that the modules cannot rely on an
order of cameras. By default a group shares its timestep, as in inference; `timestep_per: view` draws one for every
view, as the authors' released forward pass does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffportrait3d.networks import CrossViewAttention

from .dataset.images import Batch, Sampler, ViewGroups, fixed_groups, save_sheet
from .engine.command import stage_command
from .engine.config import Number
from .engine.stage import NetworkSource
from .objectives.denoising import DenoisingConfig, DenoisingStage, guided_views


class ViewConsistencyConfig(DenoisingConfig):
    """Settings of `training.view_consistency`. `loop.batch_size` counts groups."""

    views: int = 8
    timestep_per: Literal["group", "view"] = "group"
    shuffle: bool = Field(True, description="off: views are sorted by yaw (an ablation)")
    positions: bool = Field(True, description="off: views carry no number, so that any count is like the trained one")
    unconditional: Number = Field(
        0.0, description="share of batches without reference and camera, with the middle module; 0: the paper"
    )


class ViewConsistencyStage(DenoisingStage):
    """Noise prediction of V views of one subject together."""

    name = "view_consistency"
    kind = "view_consistency"
    config_class = ViewConsistencyConfig

    @property
    def views(self) -> int:
        return self.config.views

    @property
    def views_per_timestep(self) -> int:
        return self.views if self.config.timestep_per == "group" else 1

    def build_networks(self, networks: NetworkSource) -> None:
        super().build_networks(networks)
        if not self.config.positions:
            self.trainable.remove_positions()

    def new_network(self) -> CrossViewAttention:
        return CrossViewAttention(self.frozen["unet"].config)

    def make_sampler(self) -> Sampler:
        return self.sampler_of(ViewGroups, views=self.views, ordered=not self.config.shuffle)

    def variant(self, progress: float) -> str:
        """ "unconditional" for the configured share of batches, by their numbers: the same ones in every process."""
        draw = np.random.default_rng((self.config.loop.seed, 2, self.sampler.position))
        return "unconditional" if draw.random() < self.config.unconditional else ""

    def inputs(self, batch: Batch, variant: str) -> dict[str, Tensor]:
        inputs = super().inputs(batch, variant)
        return {"z": inputs["z"]} if variant == "unconditional" else inputs

    def predict(self, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        views = self.config.views
        context = self.context(len(x))
        if "references" not in inputs:
            return self.denoiser.unconditional(x, t, context, views)
        with torch.no_grad():
            bank = self.bank(inputs["references"], t)
            # F_cam sees every view for itself, so nothing before F's view attention needs a gradient.
            residuals = self.denoiser.view_controlnet(x, inputs["camera_images"], t, context)
        return self.denoiser.unet(
            x, t, context, bank=bank, residuals=residuals, cross_view=self.trainable, num_views=views
        )

    def validate(self, image: Path) -> dict[str, float]:
        batch = fixed_groups(self.validation, max(1, self.config.validation_subjects // 4), self.config.views)
        first = Batch(batch.targets[:1], batch.references[:1], batch.flips[:1])
        references, targets = self.images(first)
        rows = [references.expand(len(targets), -1, -1, -1), self.camera_images(first, self.validation), targets]
        alone = self.denoiser.with_networks(view_consistency=None)
        save_sheet(image, [*rows, guided_views(self, first, alone), guided_views(self, first, self.denoiser)])
        return {"loss": self.validation_loss(batch, repeats=6)}

    def facts(self) -> dict[str, Any]:
        return {
            "num_views": self.config.views,
            "middle_view_attention": "unconditional",
            "timestep_per": self.config.timestep_per,
            **super().facts(),
        }


if __name__ == "__main__":
    raise SystemExit(stage_command(ViewConsistencyStage))
