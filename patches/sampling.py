"""DDIM(eta) as the official code runs it, inside the host's own sampling loop, and noise that belongs to views.

With x_VE = x / sqrt(abar) and sigma = sqrt((1 - abar) / abar), DDIM(eta) is the host's Euler-ancestral step with the
same eta. What the official code does differently from stock sampling is here: its timesteps, its last noise level
(alphas_cumprod[0], not 1), and a start at timestep 999 that is used at the first step's timestep. All of this is about
the ends of a whole schedule: a run over a part of it begins and ends as the host's samplers do, so that parts add up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import comfy.model_management
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import sample_dpmpp_2m, sample_euler_ancestral
from torch import Tensor

from ..diffportrait3d.choices import check_choice
from ..diffportrait3d.diffusion import Schedule
from ..diffportrait3d.pipeline import PRESETS, Sampling
from .noise import StepNoise, step_noise_of, warn_of_zero_terminal_snr
from .run_state import SigmaRange
from .view_memory import note_end, views_of_run

CUSTOM = "custom"
GUIDED = ("guided_start_percent", "guided_end_percent")
STARTS = ("t=999", "schedule")
SAME_SIGMA = 1e-5  # relative


def preset_widgets() -> dict[str, dict[str, float]]:
    """What each of the core's presets sets, by the names of the nodes' widgets; the editor shows it there."""
    return {name: _widgets(sampling) for name, sampling in PRESETS.items()}


def _widgets(sampling: Sampling) -> dict[str, float]:
    widgets = {"steps": sampling.steps, "eta": sampling.eta if sampling.solver == "ddim" else 0.0}
    if sampling.guided != Sampling.guided:  # else that part is the user's own
        first, end = (timestep / Sampling.guided[1] for timestep in sampling.guided)
        widgets |= zip(GUIDED, (1 - end, 1 - first), strict=True)
    return widgets


def ddim_sigmas(model_sampling, steps: int) -> Tensor:
    """Sigmas [steps + 1] of the official code's timesteps, highest first, ending at timestep 0.

    Raises:
        ValueError: steps out of range, or a model without Stable Diffusion's discrete schedule.
    """
    table = _sigma_table(model_sampling)
    return table[[*reversed(Schedule(num_timesteps=len(table)).ddim_timesteps(steps)), 0]]


def trailing_sigmas(model_sampling, steps: int) -> Tensor:
    """Sigmas [steps + 1] of trailing timesteps, from the model's highest one to 0.

    Raises:
        ValueError: as for `ddim_sigmas`.
    """
    table = _sigma_table(model_sampling)
    sigmas = table[[*reversed(Schedule(num_timesteps=len(table)).trailing_timesteps(steps))]]
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _sigma_table(model_sampling) -> Tensor:
    """float32 [T], of ascending timesteps."""
    table = getattr(model_sampling, "sigmas", None)
    if table is None or not hasattr(model_sampling, "linear_end"):
        raise ValueError(
            f"The DDIM presets need SD1.5's discrete noise schedule, not {type(model_sampling).__name__}; "
            "use a stock scheduler with SamplerCustomAdvanced."
        )
    return table.float().cpu()


def chosen_schedule(
    model, preset: str, steps: int, eta: float, start: str, indices: Sequence[int] | None = None, denoise: float = 1.0
) -> tuple[comfy.samplers.KSAMPLER, Tensor]:
    """(SAMPLER, SIGMAS) of a preset on a MODEL.

    The SIGMAS end at 0, as the host's do, so that every sampler ends without noise there, also around a noise mask. The
    SAMPLER makes the official code's last step of theirs.

    Args:
        preset: one of the core's PRESETS, or "custom": DDIM with `steps` and `eta`.
        indices: numbers of the views, where they are known.
        denoise: the last part of a schedule that is longer by 1 / denoise, as in KSampler.

    Raises:
        ValueError: more steps than the model has noise levels.
    """
    chosen = PRESETS.get(preset) or Sampling(steps, "ddim", eta)
    steps, eta, second_order = chosen.steps, chosen.eta, chosen.solver == "dpmpp_2m"
    if denoise <= 0:
        return DDIMSampler(eta, start, indices=indices), torch.zeros(0)
    total = steps if denoise > 0.9999 else int(steps / denoise)
    model_sampling = model.get_model_object("model_sampling")
    _check_levels(len(_sigma_table(model_sampling)), total, preset, denoise)
    part = f"{steps} steps" if total == steps else f"the last {steps} of {total} steps"
    solver = "DPM-Solver++(2M)" if second_order else f"DDIM with eta {eta:g}"
    logging.info("DiffPortrait3D: preset %s, %s of %s", preset, part, solver)
    if second_order:
        sigmas = trailing_sigmas(model_sampling, total)
        return SecondOrderSampler(start, sigmas=sigmas, indices=indices), sigmas[-(steps + 1) :]
    sigmas = ddim_sigmas(model_sampling, total)
    sampler = DDIMSampler(eta, start, indices=indices, sigmas=sigmas)
    return sampler, torch.cat([sigmas[-(steps + 1) : -1], sigmas.new_zeros(1)])


def _check_levels(levels: int, steps: int, preset: str, denoise: float) -> None:
    if steps <= levels:
        return
    wanted = f"preset {preset}" + (f" with denoise {denoise:g}" if denoise < 1 else "")
    way_out = f"choose preset {CUSTOM} with fewer steps" + (" or a higher denoise" if denoise < 1 else "")
    if levels < Schedule().num_timesteps:
        way_out = (
            f"choose preset {CUSTOM} with 4 to 8 steps and guidance 1, as LCM wants it, or Apply View Consistency with "
            "the host's KSampler and its sampler lcm"
        )
    raise ValueError(f"{wanted} takes {steps} steps, and this MODEL has {levels} noise levels: {way_out}.")


def part_of(sigmas: Tensor, start_at_step: int, end_at_step: int, leftover_noise: bool) -> Tensor:
    """The steps from one number to another as KSampler (Advanced) counts them; empty where none is left.

    Args:
        leftover_noise: whether an early end keeps its noise; else the last step goes to 0.
    """
    if end_at_step < len(sigmas) - 1:
        sigmas = sigmas[: end_at_step + 1].clone()
        if not leftover_noise:
            sigmas[-1] = 0.0
    return sigmas[start_at_step:] if start_at_step < len(sigmas) - 1 else sigmas[:0]


class OfficialSampler(comfy.samplers.KSAMPLER):
    """A sampling function of the host with the official code's start, for a whole schedule or any part of it.

    Subclasses say what the steps are (`run_steps`).

    Args:
        start: "t=999" diffuses the latent to timestep 999 and hands it to the first step as it is (release), where a
            run starts with noise at the schedule's first step or above the model's highest noise level; other runs,
            and "schedule", diffuse it to the first step's own noise level.
        sigmas: the whole schedule; None: whatever a run is given is the whole.
        indices: numbers of the views; None: found by the run's noise or latents, see `view_memory`.
    """

    def __init__(self, start: str = "t=999", sigmas: Tensor | None = None, indices: Sequence[int] | None = None):
        check_choice("start", start, STARTS)
        super().__init__(self.run_steps)
        self.start, self.sigmas, self.indices = start, sigmas, indices

    def run_steps(self, model, x, sigmas, extra_args=None, callback=None, disable=None, views=None) -> Tensor:
        """Latents [V, C, h, w] after all steps. `views`: seed and number of each, where they are known."""
        raise NotImplementedError

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
        views = views_of_run(noise, latent_image, extra_args.get("seed") or 0, self.indices)
        is_first = _same(sigmas[0], self._whole(sigmas)[0]) or self.max_denoise(model_wrap, sigmas)
        if self.start == "t=999" and is_first and noise.any():
            if latent_image.any():
                warn_of_zero_terminal_snr(model_wrap.inner_model.model_sampling)
            last_sigma = model_wrap.inner_model.model_sampling.sigmas[-1]
            noise = official_start(noise, latent_image, sigmas[0], last_sigma, self.max_denoise(model_wrap, sigmas))
        run = comfy.samplers.KSAMPLER(self.run_steps, {"views": views})
        if self._ends_whole(sigmas):
            sigmas = torch.cat([sigmas[:-1], self._whole(sigmas)[-1:].to(sigmas)])
        samples = run.sample(model_wrap, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)
        if not self._ends_whole(sigmas):
            note_end(model_wrap.inner_model, samples, views)
        return samples

    def _whole(self, sigmas: Tensor) -> Tensor:
        return sigmas if self.sigmas is None else self.sigmas

    def _ends_whole(self, sigmas: Tensor) -> bool:
        """Whether a run's last step is the whole schedule's last step, which the SIGMAS give as a step to 0."""
        whole = self._whole(sigmas)
        return len(sigmas) > 1 and _same(sigmas[-2], whole[-2]) and (sigmas[-1] == 0 or _same(sigmas[-1], whole[-1]))

    def _step_numbers(self, sigmas: Tensor) -> list[int]:
        """Number of every step of `sigmas` in the whole schedule; a number of its own for a sigma that is not in it."""
        given, whole = sigmas[:-1].float().cpu(), self._whole(sigmas).float().cpu()
        found = [torch.isclose(whole, sigma, rtol=SAME_SIGMA, atol=0.0).nonzero() for sigma in given]
        bits = given.view(torch.int32).tolist()
        return [int(places[0]) if len(places) else own for places, own in zip(found, bits, strict=True)]


class DDIMSampler(OfficialSampler):
    """SAMPLER of the official code; give it `ddim_sigmas` or a part of them. Any other sigmas work, too.

    Args:
        eta: 0 deterministic, 1 ancestral; the official code uses 0.5.
        step_noise: (step of the whole schedule, x) -> noise; None for noise per view from the run's seed.
        start, sigmas, indices: as for OfficialSampler.
    """

    def __init__(self, eta: float, *args, step_noise: StepNoise | None = None, **kwargs):
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be between 0 and 1, not {eta}")
        super().__init__(*args, **kwargs)
        self.eta, self.step_noise = eta, step_noise

    def run_steps(self, model, x, sigmas, extra_args=None, callback=None, disable=None, views=None) -> Tensor:
        if views is None:  # called by another pack's sampler around this one
            views = views_of_run(model.noise, model.latent_image, extra_args.get("seed") or 0, self.indices)
        draw = self.step_noise or step_noise_of(views)
        numbers = iter(self._step_numbers(sigmas))  # the host asks once a step

        def noise(*_):
            return draw(next(numbers), x) if self.eta else torch.zeros_like(x)

        out = sample_euler_ancestral(model, x, sigmas, extra_args, callback, disable, eta=self.eta, noise_sampler=noise)
        if not self._ends_whole(sigmas) or sigmas[-1] == 0:
            return out
        out = out / torch.sqrt(1.0 + sigmas[-1] ** 2)  # back from x_VE
        return _keep_masked(model, out, sigmas, extra_args)


class SecondOrderSampler(OfficialSampler):
    """The host's DPM-Solver++(2M) with the official code's start; give it `trailing_sigmas` or a part of them."""

    def run_steps(self, model, x, sigmas, extra_args=None, callback=None, disable=None, views=None) -> Tensor:
        return sample_dpmpp_2m(model, x, sigmas, extra_args, callback, disable)


def _same(sigma: Tensor, other: Tensor) -> bool:
    return math.isclose(float(sigma), float(other), rel_tol=SAME_SIGMA)


def _keep_masked(model, x: Tensor, sigmas: Tensor, extra_args: dict) -> Tensor:
    """x with the input where the run's noise mask keeps it: the official code's last noise level is not 0.

    The mask is the one of the last step, which the host's Differential Diffusion may have changed.
    """
    mask, function = extra_args["denoise_mask"], extra_args["model_options"].get("denoise_mask_function")
    if mask is None:
        return x
    if function is not None:
        options = {"model": model.inner_model, "sigmas": model.sigmas}
        mask = function(sigmas[-2].expand(len(x)), mask, extra_options=options)
    return x * mask + model.latent_image * (1.0 - mask)


def official_start(noise: Tensor, latent: Tensor, sigma: Tensor, sigma_start: Tensor, max_denoise: bool) -> Tensor:
    """The noise with which the host's own noise scaling arrives at the official code's start.

    The official start is x = sqrt(abar_999) z + sqrt(1 - abar_999) n, taken as if it stood at the first step's sigma.

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
    """The same prompt without its ControlNets: what the official code's unconditional pass sees."""
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


class PartlyGuided(comfy.samplers.CFGGuider):
    """The host's guidance in a part of the schedule (Kynkaanniemi et al. 2024); other steps run no second pass."""

    def __init__(self, model, guided: SigmaRange):
        super().__init__(model)
        self.is_guided = guided.test(model.get_model_object("model_sampling"))

    def predict_noise(self, x, timestep, model_options=None, seed=None) -> Tensor:
        scale = self.cfg if self.is_guided(timestep) else 1.0
        sides = self.conds.get("negative"), self.conds.get("positive")
        return comfy.samplers.sampling_function(self.inner_model, x, timestep, *sides, scale, model_options or {}, seed)


def sample_views(
    model,
    positive,
    negative,
    noise,
    latent: dict,
    sampler,
    sigmas: Tensor,
    cfg: float,
    callback=None,
    disable_pbar: bool = True,
    guided: SigmaRange | None = None,
) -> dict:
    """LATENT -> LATENT through the host's CFGGuider, as SamplerCustomAdvanced does it.

    Args:
        noise: NOISE object; its seed also feeds the steps.
        latent: LATENT with one entry per view, samples [V, 4, h, w].
        callback: (step, x0, x, steps), e.g. the host's preview.
        guided: the part of the schedule in which `cfg` acts; None: all of it.

    Raises:
        ValueError: see `check_views`.
    """
    check_views(model, positive, latent)
    guider = comfy.samplers.CFGGuider(model) if guided is None or guided.whole else PartlyGuided(model, guided)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    samples = guider.sample(
        noise.generate_noise(latent),
        latent["samples"],
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=disable_pbar,
        seed=noise.seed,
    )
    return {**latent, "samples": samples.to(comfy.model_management.intermediate_device())}
