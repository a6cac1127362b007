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


@torch.no_grad()
def single_passes(golden: Golden, denoiser: Denoiser) -> dict[str, Tensor]:
    inputs, context = golden.inputs, golden.context
    x, t, hint = inputs["x_noisy"], inputs["t"], inputs["hint"]
    plain = Denoiser(denoiser.unet, denoiser.reference_encoder, denoiser.view_controlnet)
    bank = denoiser.bank(inputs["ref_latent"], t, context)
    two_references = torch.cat([inputs["ref_latent"], inputs["ref_latent2"]])
    bank2 = denoiser.bank(two_references, t, context)
    return {
        "eps_base": plain.conditional(x, t, context),
        "eps_ref": plain.conditional(x, t, context, bank),
        "eps_ref_cn": plain.conditional(x, t, context, bank, hint),
        "eps_cn_only": plain.conditional(x, t, context, None, hint),
        "eps_motion_condpath": denoiser.conditional(x, t, context, None, None, NUM_VIEWS),
        "eps_cn_motion": denoiser.conditional(x, t, context, None, hint, NUM_VIEWS),
        "eps_ref_motion": denoiser.conditional(x, t, context, bank, None, NUM_VIEWS),
        "eps_full": denoiser.conditional(x, t, context, bank, hint, NUM_VIEWS),
        "eps_full_2ref": denoiser.conditional(x, t, context, bank2, hint, NUM_VIEWS),
        "eps_uncond": denoiser.unconditional(x, t, context, NUM_VIEWS),
        "eps_cfg3": denoiser.guided(x, t, context, bank, hint, NUM_VIEWS, scale=3.0),
    }


@torch.no_grad()
def trajectories(golden: Golden, denoiser: Denoiser) -> dict[str, Tensor]:
    inputs, schedule, outputs = golden.inputs, Schedule(), {}

    def eps(x: Tensor, t: Tensor) -> Tensor:
        bank = denoiser.bank(inputs["ref_latent"], t, golden.context)
        return denoiser.guided(x, t, golden.context, bank, inputs["hint"], NUM_VIEWS, scale=3.0)

    for name, eta in (("ddim_eta0", 0.0), ("ddim_eta05", 0.5)):
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
