"""Stage 3 of the paper (section 3.3): attention across views.

Everything else is frozen. A sample is a group of V shuffled views of one person, so that the modules cannot rely on an
order of cameras. By default a group shares its timestep, as in inference; ``timestep_per: view`` draws one for every
view, as the authors' released forward pass does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffportrait3d.choices import check_choice
from diffportrait3d.command import run_main
from diffportrait3d.denoiser import Denoiser
from diffportrait3d.networks import CrossViewAttention
from diffportrait3d.weights.files import save_network

from .dataset.images import Batch, Sampler, ViewGroups, fixed_groups
from .dataset.sheets import save_grid
from .engine.config import to_dict
from .engine.loop import stage_main
from .objectives.denoising import DenoisingConfig, DenoisingStage, NetworkSource, Openings, guided_views, schedule_of

TIMESTEP_PER = ("group", "view")


@dataclass
class ViewConsistencyConfig(DenoisingConfig):
    """Settings of ``training.view_consistency``. ``loop.batch_size`` counts groups."""

    views: int = 8
    timestep_per: str = "group"
    shuffle: bool = True  # off: views are sorted by yaw (an ablation)
    positions: bool = True  # off: views carry no number, so that any count of them is like the trained one
    unconditional: float = 0.0  # share of batches without reference and camera, with the middle module; 0: the paper


class ViewConsistencyStage(DenoisingStage):
    """Noise prediction of V views of one subject together."""

    name = "view_consistency"
    uses_references = True
    uses_conditions = True

    def check(self, config: ViewConsistencyConfig) -> None:
        super().check(config)
        check_choice("timestep_per", config.timestep_per, TIMESTEP_PER)

    @property
    def views(self) -> int:
        return self.config.views

    @property
    def branches(self) -> bool:
        return self.config.unconditional > 0

    def build_networks(self, source: NetworkSource) -> None:
        (unet, metadata), (reference, reference_metadata) = source("unet"), source("reference_encoder")
        control, config = source("view_controlnet")[0], self.config
        config.reference_timestep = reference_metadata.get("reference_timestep", config.reference_timestep)
        self.schedule = schedule_of(metadata)
        self.sharing = config.views if config.timestep_per == "group" else 1
        new = not config.inputs.view_consistency
        self.trainable = CrossViewAttention(unet.config) if new else source("view_consistency")[0]
        if not config.positions:
            self.trainable.remove_positions()
        others = {"unet": unet, "reference_encoder": reference, "view_controlnet": control}
        self.frozen |= {name: module.to(self.device) for name, module in others.items()}
        self.denoiser = Denoiser(unet, reference, control, self.trainable, config.reference_timestep)

    def make_sampler(self) -> Sampler:
        config, loop = self.config, self.config.loop
        return ViewGroups(
            self.data, loop.batch_size, config.views, loop.seed, config.data.flip, ordered=not config.shuffle
        )

    def predict(self, x: Tensor, t: Tensor, openings: Openings) -> Tensor:
        views = self.config.views
        context = self.context(len(x))
        if self.trainable.training and self.branches and float(torch.rand(())) < self.config.unconditional:
            return self.denoiser.unconditional(x, t, context, views)
        with torch.no_grad():
            bank = self.bank(openings.references, t)
            # F_cam sees every view for itself, so nothing before F's view attention needs a gradient.
            residuals = self.denoiser.view_controlnet(x, openings.hints, t, context)
        return self.denoiser.unet(
            x, t, context, bank=bank, residuals=residuals, cross_view=self.trainable, num_views=views
        )

    def validation_groups(self) -> Batch:
        return fixed_groups(self.validation, max(1, self.config.validation_subjects // 4), self.config.views)

    def validation_loss(self, batch: Batch) -> float:
        """As for the other stages, with one timestep for a group."""
        generator, total, repeats = torch.Generator().manual_seed(1), 0.0, 6
        count, views = batch.targets.shape
        shape = (count * views, *self.validation_latents.values.shape[2:])
        for k in range(repeats):
            offset = (torch.arange(count) * repeats + k + 0.5) / (repeats * count)
            t = (offset * self.schedule.num_timesteps).long().repeat_interleave(views).to(self.device)
            noise = torch.randn(shape, generator=generator).to(self.device)
            total += float(self.noise_loss(batch, self.validation, self.validation_latents, t, noise))
        return total / repeats

    def validate(self, picture: Path) -> dict[str, float]:
        batch = self.validation_groups()
        first = Batch(batch.targets[:1], batch.references[:1], batch.flips[:1])
        references, targets = self.pictures(first)
        rows = [references.expand(len(targets), -1, -1, -1), self.hints(first, self.validation), targets]
        with_attention = guided_views(self, first)
        self.denoiser.view_consistency = None
        without = guided_views(self, first)
        self.denoiser.view_consistency = self.trainable
        save_grid(picture, [*rows, without, with_attention])
        return {"loss": self.validation_loss(batch)}

    def finish(self, run_dir: Path, summary: dict[str, Any]) -> None:
        save_network(
            run_dir / "view_consistency.safetensors",
            self.trainable,
            "view_consistency",
            num_views=self.config.views,
            middle_view_attention="unconditional",
            timestep_per=self.config.timestep_per,
            reference_timestep=self.config.reference_timestep,
            linear_end=self.schedule.linear_end,
            image_size=self.data.resolution,
            training={**summary, "config": to_dict(self.config)},
        )


build = ViewConsistencyStage


def main(argv: list[str] | None = None) -> int:
    return stage_main(ViewConsistencyStage, ViewConsistencyConfig, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
