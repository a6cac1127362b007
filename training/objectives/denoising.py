"""What the diffusion stages share: frozen inputs, cached latents, the noise-prediction loss, sampled previews."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffportrait3d.denoiser import GUIDANCE, Denoiser
from diffportrait3d.diffusion import Schedule, ddim_sample
from diffportrait3d.networks import NETWORKS

from ..dataset.images import (
    Batch,
    MultiViewDataset,
    Sampler,
    ViewGroups,
    cached_latents,
    fixed_groups,
    pick,
    pick_latents,
)
from ..engine.config import Number, StageConfig
from ..engine.stage import NetworkSource, Stage


class DenoisingConfig(StageConfig):
    """Settings of all diffusion stages."""

    latents_dir: str | None = Field(None, description="where encoded training images are kept; none: the run folder")
    reference_timestep: Literal["current", "zero"] = Field(
        "current", description="what F_ref is given: the step's timestep, or zero; later stages follow F_ref's file"
    )
    timesteps: Literal["uniform", "cubic"] = Field(
        "uniform", description="of training; cubic: mostly noisy ones, where pose and colours are decided"
    )
    loss_weighting: Literal["epsilon", "velocity"] = Field(
        "epsilon", description="of training: the paper's; velocity: times 1 / alphas_cumprod, noisier ones count"
    )
    linear_end: Number = Field(0.012, description="last beta of the base stage; later stages follow its file")
    validation_subjects: int = 8
    validation_loss_samples: int = 96
    ddim_steps: int = 25
    guidance_scale: Number = GUIDANCE


class DenoisingStage(Stage):
    """A stage whose loss is the mean squared error of predicted noise.

    What `predict` is given follows from the networks that the stage's kind builds on.

    Attributes:
        views_per_timestep: this many consecutive targets are given the same timestep.
        denoiser: all networks together; its trained part is `trainable`.
    """

    views_per_timestep = 1

    def build_networks(self, networks: NetworkSource) -> None:
        """Frozen are the networks that the stage's kind builds on."""
        metadata: dict[str, dict[str, Any]] = {}
        for kind in NETWORKS[self.kind].needs:
            if kind != "autoencoder":
                self.frozen[kind], metadata[kind] = networks(kind)
        of_unet = metadata.get("unet", {"linear_end": self.config.linear_end})  # SD1.5's file names none
        self.schedule = Schedule(linear_end=float(of_unet.get("linear_end", 0.012)))
        of_reference = metadata.get("reference_encoder", {})
        self.reference_timestep = of_reference.get("reference_timestep", self.config.reference_timestep)
        self.trainable = self.trained_network(networks, self.new_network)
        together: dict[str, Any] = {**self.frozen, self.kind: self.trainable}
        self.denoiser = Denoiser(**together, reference_timestep=self.reference_timestep)
        self.check_widths()
        self.autoencoder = networks("autoencoder")[0]  # it encodes the data, and decodes previews
        self.frozen["autoencoder"] = self.autoencoder
        self.prompt = networks.prompt(self.denoiser.unet.config.context_dim)

    def new_network(self) -> nn.Module:
        """What training begins with: a copy of F, as far as the network has its layers."""
        unet = self.frozen["unet"]
        network = NETWORKS[self.kind].module(unet.config)
        network.load_from_unet(unet.state_dict())
        return network

    def check_widths(self) -> None:
        """Raises ValueError where a network cannot work with F."""
        width = self.denoiser.unet.config.model_channels
        for name, network in self.denoiser.named_children():
            if network.config.model_channels != width:
                raise ValueError(
                    f"inputs.{name} is {network.config.model_channels} channels wide, inputs.unet {width}: "
                    "they belong to different base models."
                )

    def make_sampler(self) -> Sampler:
        return self.sampler_of(ViewGroups, views=self.views)

    def context(self, count: int) -> Tensor:
        """The empty prompt for `count` latents [N, L, context_dim]."""
        return self.prompt.to(self.device).expand(count, -1, -1)

    def open_data(self, data: MultiViewDataset, validation: MultiViewDataset) -> None:
        super().open_data(data, validation)
        self.schedule, self.prompt = self.schedule.to(self.device), self.prompt.to(self.device)
        folder = Path(self.config.latents_dir or self.config.run_dir)
        self.autoencoder.to(self.device)
        self.latents, self.validation_latents = (
            cached_latents(split, self.autoencoder, folder).to(split.device) for split in (data, validation)
        )

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"linear_end": self.schedule.linear_end}
        if self.denoiser.reference_encoder is not None:
            facts["reference_timestep"] = self.reference_timestep
        return facts

    # ---- training

    def inputs(self, batch: Batch, variant: str) -> dict[str, Tensor]:
        z = pick_latents(self.latents, batch.targets.ravel(), batch.target_flips, self.device)  # [N, 4, h, w]
        return {"z": z, **self.denoiser_inputs(batch, self.data, self.latents)}

    def loss(self, inputs: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
        z = inputs["z"]
        t = self.draw_timesteps(len(z))
        noise = torch.randn(z.shape, device=self.device)
        return self.losses(self.error(z, t, noise, inputs), t)

    def losses(self, error: Tensor, t: Tensor) -> dict[str, Tensor]:
        """What is minimised, and the mean square if that is not it, of an error in noise [N, 4, h, w] at t [N].

        The velocity alpha eps - sigma x0 (Salimans & Ho 2022) that belongs to a noise prediction is wrong by
        1 / alpha times its error: the same optimum at every timestep, but what the image is counts at the noisy ones.
        """
        square = error.square().mean()
        if self.config.loss_weighting == "epsilon":
            return {"loss": square}
        abar = self.schedule.alphas_cumprod.to(error.device)[t]  # [N]
        return {"loss": (error.square() / abar[:, None, None, None]).mean(), "square": square}

    def noise_loss(self, batch: Batch, data: MultiViewDataset, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean of (eps - eps_theta(x_t, t, ...))^2 (paper eq. 1) of a batch at t [N]."""
        z = pick_latents(latents, batch.targets.ravel(), batch.target_flips, self.device)  # [N, 4, h, w]
        return self.error(z, t, noise, self.denoiser_inputs(batch, data, latents)).square().mean()

    def error(self, z: Tensor, t: Tensor, noise: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """eps_theta(x_t, t, ...) - eps of clean latents z at t [N]: [N, 4, h, w]."""
        x = self.schedule.q_sample(z, t, noise)
        return self.predict(x, t, inputs).float() - noise

    @property
    def views(self) -> int:
        """Targets per reference in a batch."""
        return self.views_per_timestep

    def dummy_loss(self, samples: int) -> dict[str, Tensor]:
        count, size, side = samples * self.views, self.resolution, self.resolution // 8
        inputs = {}
        if self.denoiser.reference_encoder is not None:
            inputs["references"] = torch.zeros(samples, 4, side, side, device=self.device)
        if self.denoiser.view_controlnet is not None:
            inputs["camera_images"] = torch.zeros(count, 3, size, size, device=self.device)
        z = torch.zeros(count, 4, side, side, device=self.device)
        t = torch.zeros(count, dtype=torch.long, device=self.device)
        return self.losses(self.error(z, t, torch.zeros_like(z), inputs), t)

    def draw_timesteps(self, count: int) -> Tensor:
        """Timesteps of a batch of `count` latents in 0..T-1: int64 [count].

        Uniform, or (1 - u^3) T for uniform u (T2I-Adapter, Mou et al. 2023, section 3.4).
        """
        steps, groups = self.schedule.num_timesteps, count // self.views_per_timestep
        if self.config.timesteps == "uniform":
            t = torch.randint(0, steps, (groups,), device=self.device)
        else:
            t = ((1 - torch.rand(groups, device=self.device) ** 3) * steps).long().clamp(max=steps - 1)
        return t.repeat_interleave(self.views_per_timestep)

    def predict(self, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Noise predicted for x [N, 4, h, w] at t [N] with what `denoiser_inputs` gives."""
        raise NotImplementedError

    def denoiser_inputs(self, batch: Batch, data: MultiViewDataset, latents: Tensor) -> dict[str, Tensor]:
        """What a batch gives to the networks besides the noisy views, as far as the stage uses it: "references", clean
        latents, one per group of targets [B, 4, h, w]; "camera_images", somebody else at the targets' cameras
        [B*V, 3, H, W] in [-1, 1]."""
        found = {}
        if self.denoiser.reference_encoder is not None:
            found["references"] = self.reference_latents(batch, latents)
        if self.denoiser.view_controlnet is not None:
            found["camera_images"] = self.camera_images(batch, data)
        return found

    def reference_latents(self, batch: Batch, latents: Tensor) -> Tensor:
        """Clean latents of the batch's references [B, 4, h, w]."""
        return pick_latents(latents, batch.references, batch.flips, self.device)

    def camera_images(self, batch: Batch, data: MultiViewDataset) -> Tensor:
        """Camera images of the batch's targets [N, 3, H, W] in [-1, 1]."""
        return pick(data.conditions, batch.targets.ravel(), batch.target_flips, self.device)

    def references(self, z_ref: Tensor, t: Tensor) -> list[Tensor]:
        """F_ref's token bank for one reference per sample: 16 tensors [B, M, C]. `t`: [B]."""
        t_ref = t if self.reference_timestep == "current" else torch.zeros_like(t)
        return self.denoiser.reference_encoder(z_ref, t_ref, self.context(len(z_ref)))

    def bank(self, z_ref: Tensor, t: Tensor) -> list[Tensor]:
        """Tokens of references [B, 4, h, w] for targets at `t` [B*V]: 16 tensors, [B, M, C] where the V targets of a
        reference share its timestep, else [B*V, M, C]."""
        views = len(t) // len(z_ref)
        if self.reference_timestep == "current" and self.views_per_timestep != views:
            return self.references(z_ref.repeat_interleave(views, 0), t)
        return self.references(z_ref, t[::views])

    # ---- validation

    def validation_batch(self) -> Batch:
        """Fixed validation samples with one target each."""
        batch = fixed_groups(self.validation, self.config.validation_subjects, 1)
        return Batch(batch.targets[:, 0], batch.references, batch.flips)

    def validation_loss(self, batch: Batch, repeats: int | None = None) -> float:
        """The noise loss on fixed samples, fixed noise, and timesteps spread evenly: comparable over the run."""
        generator, total = torch.Generator().manual_seed(1), 0.0
        count, views = len(batch.flips), batch.targets.size // len(batch.flips)
        repeats = repeats or max(1, self.config.validation_loss_samples // count)
        shape = (count * views, *self.validation_latents.shape[2:])
        for k in range(repeats):
            offset = (torch.arange(count) * repeats + k + 0.5) / (repeats * count)
            t = (offset * self.schedule.num_timesteps).long().repeat_interleave(views).to(self.device)
            noise = torch.randn(shape, generator=generator).to(self.device)
            total += float(self.noise_loss(batch, self.validation, self.validation_latents, t, noise))
        return total / repeats

    def sample(self, eps: Callable[[Tensor, Tensor], Tensor], count: int) -> Tensor:
        """Images [count, 3, H, W] in about [-1, 1] by DDIM (eta 0.5) with fixed start and step noise."""
        generator = torch.Generator().manual_seed(2)
        shape = (count, *self.validation_latents.shape[2:])

        def draw(*_) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        latents = ddim_sample(eps, draw(), self.schedule, self.config.ddim_steps, step_noise=lambda step, x: draw())
        return self.decode(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, a few at a time."""
        return torch.cat([self.autoencoder.decode(chunk) for chunk in latents.split(8)])

    def images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """References and targets of a validation batch as images in [-1, 1]."""
        references = pick(self.validation.images, batch.references, batch.flips)
        return references, pick(self.validation.images, batch.targets.ravel(), batch.target_flips)


def guided_views(stage: DenoisingStage, batch: Batch, denoiser: Denoiser | None = None) -> Tensor:
    """Samples of a batch's targets with guidance, each with its own subject's reference; groups see each other.

    denoiser: other networks than the stage's.
    """
    denoiser = denoiser or stage.denoiser
    grouped = batch.targets.ndim == 2
    views = batch.targets.shape[1] if grouped else 1
    count = batch.targets.size
    context = stage.context(count)
    z_ref = stage.reference_latents(batch, stage.validation_latents)
    camera_images = stage.camera_images(batch, stage.validation)
    scale = stage.config.guidance_scale

    def eps(x: Tensor, t: Tensor) -> Tensor:
        bank = [tokens.repeat_interleave(views, 0) for tokens in stage.references(z_ref, t[: len(z_ref)])]
        num_views = views if grouped else None
        return denoiser.guided(x, t, context, bank, camera_images, num_views, scale)

    return stage.sample(eps, count)
