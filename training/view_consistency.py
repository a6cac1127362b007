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

from diffportrait3d.checkpoints import save_network
from diffportrait3d.denoiser import Denoiser
from diffportrait3d.networks import ViewConsistency

from .config import parse_arguments, to_dict
from .data import Batch, LatentCache, MultiViewDataset, ViewGroups, fixed_groups
from .denoising import DenoisingConfig, DenoisingStage, empty_context, frozen, guided_views, schedule_of
from .loop import stage_main
from .pictures import save_grid

TIMESTEP_PER = ("group", "view")


@dataclass
class ViewConsistencyConfig(DenoisingConfig):
    """Settings of ``training.view_consistency``. ``loop.batch_size`` counts groups."""

    views: int = 8
    timestep_per: str = "group"
    shuffle: bool = True  # off: views keep the dataset's order (an ablation)
    positions: bool = True  # off: views carry no number, so that any count of them is like the trained one
    unconditional: float = 0.0  # share of batches without reference and camera, with the middle module; 0: the paper


class ViewConsistencyStage(DenoisingStage):
    """Noise prediction of V views of one subject together."""

    name = "view_consistency"
    needs_conditions = True

    def __init__(self, config: ViewConsistencyConfig, device: torch.device):
        if config.timestep_per not in TIMESTEP_PER:
            raise ValueError(f"timestep_per must be one of {', '.join(TIMESTEP_PER)}, not '{config.timestep_per}'.")
        unet, metadata = frozen(config.inputs.unet, "unet")
        reference, reference_metadata = frozen(config.inputs.reference_encoder, "reference_encoder")
        control, _ = frozen(config.inputs.view_controlnet, "view_controlnet")
        config.reference_timestep = reference_metadata.get("reference_timestep", config.reference_timestep)
        self.setup(config, device, schedule_of(metadata))
        self.trainable = ViewConsistency(unet.config)
        if not config.positions:
            self.trainable.remove_positions()
        self.frozen |= {
            "unet": unet.to(device),
            "reference_encoder": reference.to(device),
            "view_controlnet": control.to(device),
        }
        self.denoiser = Denoiser(unet, reference, control, self.trainable, config.reference_timestep)
        self.sampler = ViewGroups(
            self.data,
            config.loop.batch_size,
            config.views,
            config.loop.seed,
            config.data.flip,
            ordered=not config.shuffle,
        )

    def draw_timesteps(self, count: int) -> Tensor:
        if self.config.timestep_per == "view":
            return super().draw_timesteps(count)
        return super().draw_timesteps(count // self.config.views).repeat_interleave(self.config.views)

    def predict(self, x: Tensor, t: Tensor, batch: Batch, data: MultiViewDataset, latents: LatentCache) -> Tensor:
        views = batch.targets.shape[1]
        context = empty_context(self.denoiser.unet, len(x), self.device)
        if self.trainable.training and float(torch.rand(())) < self.config.unconditional:
            return self.denoiser.unconditional(x, t, context, views)
        with torch.no_grad():
            bank = self.bank_of_groups(self.reference_latents(batch, latents), t, views)
            # F_cam sees every view for itself, so nothing before F's view attention needs a gradient.
            residuals = self.denoiser.view_controlnet(x, self.hints(batch, data), t, context)
        return self.denoiser.unet(
            x, t, context, bank=bank, residuals=residuals, view_attention=self.trainable, num_views=views
        )

    def bank_of_groups(self, z_ref: Tensor, t: Tensor, views: int) -> list[Tensor]:
        """Tokens of every group's reference, repeated for its views: [B*V, M, C]. ``z_ref`` [B, 4, h, w], ``t`` [B*V].

        With one timestep per group F_ref runs once for each group; with one per view it has to run for every view.
        """
        if self.config.timestep_per == "view":
            return self.references(z_ref.repeat_interleave(views, 0), t)
        bank = self.references(z_ref, t[::views])
        return [tokens.repeat_interleave(views, 0) for tokens in bank]

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


def build(config: ViewConsistencyConfig, device: torch.device) -> ViewConsistencyStage:
    return ViewConsistencyStage(config, device)


def main(argv: list[str] | None = None) -> int:
    return stage_main(build, parse_arguments(ViewConsistencyConfig, __doc__, argv))


if __name__ == "__main__":
    raise SystemExit(main())
