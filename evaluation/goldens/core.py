"""The core's answers to the golden inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from diffportrait3d.denoiser import Denoiser
from diffportrait3d.diffusion import Schedule, ddim_sample, start_noise
from diffportrait3d.networks import NETWORKS as REGISTRY

from .data import GOLDEN_CONFIG, PREFIXES, Golden, deterministic_weights

NUM_VIEWS = 8
NETWORKS = {kind: REGISTRY[kind].module for kind in PREFIXES}
# name -> (reference images, camera conditions, view consistency, guidance scale); scale 0 is the unconditional pass.
SINGLE_PASSES = {
    "eps_base": (0, False, False, 1.0),
    "eps_ref": (1, False, False, 1.0),
    "eps_ref_cn": (1, True, False, 1.0),
    "eps_cn_only": (0, True, False, 1.0),
    "eps_motion_condpath": (0, False, True, 1.0),
    "eps_cn_motion": (0, True, True, 1.0),
    "eps_ref_motion": (1, False, True, 1.0),
    "eps_full": (1, True, True, 1.0),
    "eps_full_2ref": (2, True, True, 1.0),
    "eps_uncond": (1, True, True, 0.0),
    "eps_cfg3": (1, True, True, 3.0),
}
TRAJECTORIES = {"ddim_eta0": 0.0, "ddim_eta05": 0.5}


def golden_denoiser() -> Denoiser:
    """All four networks at the golden width with the deterministic weights, conventions of the release."""
    networks = {}
    for name, network_class in NETWORKS.items():
        network = network_class(GOLDEN_CONFIG)
        network.load_state_dict(deterministic_weights(network, PREFIXES[name]))
        networks[name] = network.eval().requires_grad_(False)
    return Denoiser(**networks, reference_timestep="current", middle_view_attention="unconditional")


@torch.no_grad()
def core_outputs(golden: Golden, denoiser: Denoiser | None = None) -> dict[str, Tensor]:
    """Every tensor of the golden outputs, computed by the core."""
    denoiser = denoiser or golden_denoiser()
    return single_passes(golden, denoiser) | trajectories(golden, denoiser)


def single_passes(golden: Golden, denoiser: Denoiser) -> dict[str, Tensor]:
    inputs, context, outputs = golden.inputs, golden.context, {}
    x, t = inputs["x_noisy"], inputs["t"]
    latents = torch.cat([inputs["ref_latent"], inputs["ref_latent2"]])
    banks = [None, *(denoiser.bank(latents[:count], t, context) for count in (1, 2))]
    alone = denoiser.with_networks(view_consistency=None)
    for name, (references, control, views, scale) in SINGLE_PASSES.items():
        networks, num_views = (denoiser, NUM_VIEWS) if views else (alone, None)
        if scale == 0.0:
            outputs[name] = networks.unconditional(x, t, context, num_views)
        else:
            hint = inputs["hint"] if control else None
            outputs[name] = networks.guided(x, t, context, banks[references], hint, num_views, scale)
    return outputs


def trajectories(golden: Golden, denoiser: Denoiser) -> dict[str, Tensor]:
    inputs, schedule, outputs = golden.inputs, Schedule(), {}

    def eps(x: Tensor, t: Tensor) -> Tensor:
        bank = denoiser.bank(inputs["ref_latent"], t, golden.context)
        return denoiser.guided(x, t, golden.context, bank, inputs["hint"], NUM_VIEWS, scale=3.0)

    for name, eta in TRAJECTORIES.items():
        start = start_noise(inputs["proxy_latent"], inputs["q_noise"], schedule)
        xs, predictions = [start], []

        def record(step: int, x: Tensor, pred_x0: Tensor, xs=xs, predictions=predictions) -> None:
            xs.append(x)
            predictions.append(pred_x0)

        ddim_sample(eps, start, schedule, 5, eta, lambda step, x: inputs["ddim_noise"][step].to(x), record)
        outputs[f"{name}.x"] = torch.stack(xs)
        outputs[f"{name}.pred_x0"] = torch.stack(predictions)
        outputs[f"{name}.timesteps"] = torch.tensor(schedule.ddim_timesteps(5)[::-1])
    return outputs
