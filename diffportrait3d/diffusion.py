"""Noise schedule, DDIM(eta), DPM-Solver++(2M) and the 3D-aware start noise (paper sections 3.1 and 3.4)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ETA = 0.5  # the release's DDIM


class Schedule:
    """Stable Diffusion's noise schedule: betas whose square roots are equally spaced.

    Args:
        linear_start, linear_end: first and last beta. SD1.5 has (0.00085, 0.012).
        num_timesteps: T.

    Attributes:
        betas, alphas_cumprod: float32 [T]; the product is taken in float64.
    """

    def __init__(self, linear_start: float = 0.00085, linear_end: float = 0.012, num_timesteps: int = 1000):
        self.linear_start, self.linear_end, self.num_timesteps = linear_start, linear_end, num_timesteps
        betas = torch.linspace(linear_start**0.5, linear_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        self.betas = betas.float()
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0).float()

    def to(self, device: torch.device | str) -> Schedule:
        """A copy whose tensors are on another device."""
        moved = copy.copy(self)
        moved.betas, moved.alphas_cumprod = self.betas.to(device), self.alphas_cumprod.to(device)
        return moved

    def q_sample(self, x0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """Diffuses clean latents [N, C, h, w] to timestep t (a number or [N]) in one shot."""
        t = torch.as_tensor(t, device=x0.device).expand(x0.shape[0])
        abar = self.alphas_cumprod.to(x0.device)[t].to(x0)[:, None, None, None]  # [N, 1, 1, 1]
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    def ddim_timesteps(self, steps: int) -> list[int]:
        """The release's timesteps in ascending order: 1, 21, ..., 981 for 50 steps.

        Raises:
            ValueError: steps outside 1..T.
        """
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"DDIM needs 1 to {self.num_timesteps} steps, not {steps}.")
        stride = self.num_timesteps // steps
        # T = 1000 and steps = 1000 would reach timestep 1000: the last one is clipped, as T-1 is the last there is.
        return [min(1 + i * stride, self.num_timesteps - 1) for i in range(steps)]

    def trailing_timesteps(self, steps: int) -> list[int]:
        """Evenly spaced timesteps in ascending order that end at the terminal one: 124, 249, ..., 999 for 8 steps.

        It is the timestep of `start_noise`, so few steps lose nothing of it (Lin et al. 2024, table 2).

        Raises:
            ValueError: steps outside 1..T.
        """
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"DPM-Solver++ needs 1 to {self.num_timesteps} steps, not {steps}.")
        return [round(i * self.num_timesteps / steps) - 1 for i in range(1, steps + 1)]

    def ddim_coefficients(self, steps: int, eta: float) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_t, alpha_previous and sigma for the ascending timesteps, float32 [steps].

        The last step ends at alphas_cumprod[0] rather than 1, as in the release.
        """
        timesteps = self.ddim_timesteps(steps)
        alphas = self.alphas_cumprod.double()[timesteps]
        previous = torch.cat([self.alphas_cumprod.double()[:1], alphas[:-1]])
        sigmas = eta * ((1 - previous) / (1 - alphas) * (1 - alphas / previous)).sqrt()
        return alphas.float(), previous.float(), sigmas.float()


def ddim_sample(
    eps_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    schedule: Schedule,
    steps: int = 50,
    eta: float = ETA,
    step_noise: Callable[[int, Tensor], Tensor] = lambda step, x: torch.randn_like(x),
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Denoises with DDIM(eta) (Song et al. 2021, eq. 12) over the release's timesteps.

    Args:
        eps_fn: (x, t [N] int64) -> predicted noise, guidance included.
        x: start latents [N, C, h, w].
        step_noise: (step, x) -> Gaussian noise like x, added when eta > 0.
        callback: called as (step, x after the step, predicted x0).

    Returns:
        latents at noise level alphas_cumprod[0] [N, C, h, w]
    """
    alphas, previous, sigmas = schedule.ddim_coefficients(steps, eta)
    for step, index in enumerate(reversed(range(steps))):
        t = torch.full((x.shape[0],), schedule.ddim_timesteps(steps)[index], dtype=torch.long, device=x.device)
        a, a_prev, sigma = alphas[index].item(), previous[index].item(), sigmas[index].item()
        eps = eps_fn(x, t)
        pred_x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = a_prev**0.5 * pred_x0 + max(1 - a_prev - sigma**2, 0.0) ** 0.5 * eps
        if eta > 0:
            x = x + sigma * step_noise(step, x)
        if callback is not None:
            callback(step, x, pred_x0)
    return x


def dpmpp_2m_sample(
    eps_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    schedule: Schedule,
    steps: int = 8,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Denoises with DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) over trailing timesteps.

    The first step has no prediction before it, and the last one goes to noise level 0, where the second order would
    extrapolate without bound: both are of first order, as in the host's and in the authors' own code.

    Args:
        eps_fn: (x, t [N] int64) -> predicted noise, guidance included.
        x: start latents at the terminal timestep [N, C, h, w], e.g. of `start_noise`.
        callback: called as (step, x after the step, predicted x0).

    Returns:
        clean latents [N, C, h, w]; unlike `ddim_sample`, nothing of the noise is left.

    Raises:
        ValueError: steps outside 1..T.
    """
    timesteps = schedule.trailing_timesteps(steps)[::-1]
    abar = schedule.alphas_cumprod.double()[timesteps]
    log_snr = (0.5 * (abar / (1 - abar)).log()).tolist()  # lambda of the paper
    before = None
    for step, timestep in enumerate(timesteps):
        a = abar[step].item()
        t = torch.full((x.shape[0],), timestep, dtype=torch.long, device=x.device)
        pred_x0 = (x - (1 - a) ** 0.5 * eps_fn(x, t)) / a**0.5
        if step == steps - 1:
            x = pred_x0
        else:
            h, a_next, towards = log_snr[step + 1] - log_snr[step], abar[step + 1].item(), pred_x0
            if before is not None:
                towards = pred_x0 + h / (2 * (log_snr[step] - log_snr[step - 1])) * (pred_x0 - before)
            x = ((1 - a_next) / (1 - a)) ** 0.5 * x - a_next**0.5 * math.expm1(-h) * towards
        before = pred_x0
        if callback is not None:
            callback(step, x, pred_x0)
    return x


def start_noise(proxy_latents: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """3D-aware start noise: proxy views diffused to the terminal step (section 3.4).

    Args:
        proxy_latents: scaled latents of the proxy views [V, 4, h, w].
        noise: Gaussian noise, independent per view [V, 4, h, w].

    Returns:
        [V, 4, h, w]; about 7 % of its amplitude is the proxy's layout with SD1.5's schedule.
    """
    return schedule.q_sample(proxy_latents, schedule.num_timesteps - 1, noise)


def view_noise(seed: int, view_indices: Sequence[int], shape: Sequence[int], stream: int = 0) -> Tensor:
    """Gaussian noise that depends on the seed and each view's index alone, not on how views are grouped.

    Args:
        view_indices: indices of V views.
        shape: (C, h, w).
        stream: number of the draw (0 for the start noise, k+1 for step k).

    Returns:
        float32 [V, C, h, w] on the CPU
    """

    def draw(view: int) -> Tensor:
        # A generator seeded with mixed bits: neighbouring (seed, view, stream) triples must not give shifted copies.
        mixed = (seed * 0x9E3779B97F4A7C15 + view * 0xD1B54A32D192ED03 + stream * 0x94D049BB133111EB) % 2**63
        return torch.randn(*shape, generator=torch.Generator().manual_seed(mixed))

    return torch.stack([draw(view) for view in view_indices])
