"""DDIM(eta) as the release runs it, inside the host's own sampling loop, and noise that belongs to views.

With x_VE = x / sqrt(abar) and sigma = sqrt((1 - abar) / abar), DDIM(eta) is the host's Euler-ancestral step with the
same eta. What the release does differently from stock sampling is here: its timesteps, its last noise level
(alphas_cumprod[0], not 1), and a start at timestep 999 handed over at the first step's timestep.
"""
from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import sample_euler_ancestral
from torch import Tensor

from ..diffportrait3d.choices import check_choice
from ..diffportrait3d.diffusion import Schedule, view_noise
from .noise import MODES, warn_of_zero_terminal_snr

PRESETS = {"release": (50, 0.5), "paper": (100, 0.5)}  # steps, eta; the paper is silent on eta
STARTS = ("t=999", "schedule")


def ddim_sigmas(model_sampling, steps: int) -> Tensor:
    """Sigmas [steps + 1] of the release's timesteps, highest first, ending at timestep 0.

    Raises:
        ValueError: steps out of range, or a model without Stable Diffusion's discrete schedule.
    """
    table = getattr(model_sampling, "sigmas", None)
    if table is None or not hasattr(model_sampling, "linear_end"):
        raise ValueError(
            f"The DDIM presets need SD1.5's discrete noise schedule, not {type(model_sampling).__name__}; "
            "use a stock scheduler with SamplerCustomAdvanced."
        )
    timesteps = Schedule(num_timesteps=len(table)).ddim_timesteps(steps)
    return table[[*reversed(timesteps), 0]].float().cpu()


class ViewNoise:
    """NOISE for the host's samplers: view i's noise depends on (seed, i) alone, not on its batch.

    Args:
        mode: one of `noise.MODES`. "shared" gives every view the noise of view 0; "schedule-matched" makes
            View-Consistency Sampler diffuse to the first step's noise level, whatever start it is set to.
    """

    def __init__(self, seed: int, mode: str = "paper"):
        check_choice("mode", mode, MODES)
        self.seed, self.mode = seed, mode

    @property
    def start(self) -> str | None:
        """The sampler's start that this noise asks for."""
        return "schedule" if self.mode == "schedule-matched" else None

    def generate_noise(self, latent: dict) -> Tensor:
        samples, indices = latent["samples"], view_indices(latent)
        if self.mode == "shared":
            indices = [0] * len(indices)
        return view_noise(self.seed, indices, samples.shape[1:]).to(samples.dtype)


def view_indices(latent: dict) -> list[int]:
    """Numbers of the views in a LATENT: its batch_index if it is a part of a batch."""
    return list(latent.get("batch_index") or range(latent["samples"].shape[0]))


StepNoise = Callable[[int, Tensor], Tensor]


def per_view_step_noise(seed: int, indices: list[int] | None = None) -> StepNoise:
    """Noise of step k for every view, from the same (seed, view) streams as the start noise."""

    def draw(step: int, x: Tensor) -> Tensor:
        views = range(x.shape[0]) if indices is None else indices
        return view_noise(seed, views, x.shape[1:], stream=step + 1).to(x)

    return draw


class DDIMSampler(comfy.samplers.KSAMPLER):
    """SAMPLER of the release; give it `ddim_sigmas`. Any other sigmas work, too.

    Args:
        eta: 0 deterministic, 1 ancestral; the release uses 0.5.
        start: "t=999" diffuses the latent to timestep 999 and hands it to the first step as it is (release);
            "schedule" diffuses it to the first step's own noise level.
        step_noise: (step, x) -> noise; None for noise per view from the run's seed.
        indices: numbers of the views, if they are a part of a larger set.
    """

    def __init__(self, eta: float, start: str = "t=999", step_noise: StepNoise | None = None, indices=None):
        check_choice("start", start, STARTS)
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be between 0 and 1, not {eta}")
        super().__init__(self._steps)
        self.eta, self.start, self.step_noise, self.indices = eta, start, step_noise, indices

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
        if self.start == "t=999":
            if latent_image.any():
                warn_of_zero_terminal_snr(model_wrap.inner_model.model_sampling)
            last_sigma = model_wrap.inner_model.model_sampling.sigmas[-1]
            noise = hand_over(noise, latent_image, sigmas[0], last_sigma, self.max_denoise(model_wrap, sigmas))
        return super().sample(model_wrap, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)

    def _steps(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        draw = self.step_noise or per_view_step_noise(extra_args.get("seed") or 0, self.indices)
        step = iter(range(len(sigmas)))
        x = sample_euler_ancestral(
            model, x, sigmas, extra_args, callback, disable, eta=self.eta,
            noise_sampler=lambda *_: draw(next(step), x),
        )
        return x / torch.sqrt(1.0 + sigmas[-1] ** 2)  # back from x_VE; at sigma 0 nothing


def hand_over(noise: Tensor, latent: Tensor, sigma: Tensor, sigma_start: Tensor, max_denoise: bool) -> Tensor:
    """The noise with which the host's own noise scaling arrives at the release's start.

    The release's start is x = sqrt(abar_999) z + sqrt(1 - abar_999) n, taken as if it stood at the first step's sigma.

    Args:
        noise, latent: n and z (scaled) [N, 4, h, w].
        sigma: of the first step. sigma_start: of timestep 999.
        max_denoise: whether the host scales by sqrt(1 + sigma^2) instead of sigma.
    """
    sigma, sigma_start = sigma.to(noise), sigma_start.to(noise)
    root = torch.sqrt(1.0 + sigma**2)
    start = root * (latent + sigma_start * noise) / torch.sqrt(1.0 + sigma_start**2)
    return (start - latent) / (root if max_denoise else sigma)


def without_control(conditioning: list) -> list:
    """The same prompt without its ControlNets: what the release's unconditional pass sees."""
    dropped = ("control", "control_apply_to_uncond")
    return [[tokens, {k: v for k, v in options.items() if k not in dropped}] for tokens, options in conditioning]


def check_views(model, positive: list, latent: dict) -> None:
    """Raises ValueError unless MODEL `model` can sample a LATENT (samples [V, C, h, w]) with the prompt `positive`."""
    samples, channels = latent["samples"], model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[0] == 0 or samples.shape[1] != channels:
        raise ValueError(
            f"View-Consistency Sampler: latent has the shape {tuple(samples.shape)}, and this MODEL wants (views, "
            f"{channels}, height, width) with at least one view; connect 3D-Aware Noise or Empty Latent Image."
        )
    if not torch.isfinite(samples).all():
        raise ValueError("View-Consistency Sampler: latent contains NaN or infinity; check the node it comes from.")
    if not positive:
        raise ValueError("View-Consistency Sampler: positive holds no prompt; connect an encoded text (empty will do).")
    width = model.model.model_config.unet_config.get("context_dim")
    for tokens, _ in positive:
        if tokens is not None and width is not None and tokens.shape[-1] != width:
            raise ValueError(
                f"View-Consistency Sampler: positive has {tokens.shape[-1]} numbers per token, and this MODEL reads "
                f"{width}; encode the prompt with the CLIP of the same checkpoint."
            )


def sample_views(model, positive, negative, noise, latent: dict, sampler, sigmas: Tensor, cfg: float, callback=None,
                 disable_pbar: bool = True) -> dict:
    """LATENT -> LATENT through the host's CFGGuider, as SamplerCustomAdvanced does it.

    Args:
        noise: NOISE object; its seed also feeds the steps.
        latent: LATENT with one entry per view, samples [V, 4, h, w].
        callback: (step, x0, x, steps), e.g. the host's preview.

    Raises:
        ValueError: see `check_views`.
    """
    check_views(model, positive, latent)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    samples = guider.sample(
        noise.generate_noise(latent), latent["samples"], sampler, sigmas, denoise_mask=latent.get("noise_mask"),
        callback=callback, disable_pbar=disable_pbar, seed=noise.seed,
    )
    return {**latent, "samples": samples.to(comfy.model_management.intermediate_device())}
