"""The core's answers to the golden inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from diffportrait3d.denoiser import Denoiser
from diffportrait3d.diffusion import Schedule, ddim_sample, start_noise
from diffportrait3d.networks import CrossViewAttention, ReferenceEncoder, UNet, ViewControlNet

from .data import GOLDEN_CONFIG, PREFIXES, Golden, deterministic_weights, sample_tap

NUM_VIEWS = 8
NETWORKS = {
    "unet": UNet,
    "reference_encoder": ReferenceEncoder,
    "view_controlnet": ViewControlNet,
    "view_consistency": CrossViewAttention,
}


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

        ddim_sample(eps, start, schedule, 5, eta, list(inputs["ddim_noise"]), record)
        outputs[f"{name}.x"] = torch.stack(xs)
        outputs[f"{name}.pred_x0"] = torch.stack(predictions)
        outputs[f"{name}.timesteps"] = torch.tensor(schedule.ddim_timesteps(5)[::-1])
    return outputs


@torch.no_grad()
def core_taps(golden: Golden, denoiser: Denoiser) -> dict[str, Tensor]:
    """Samples of the intermediate tensors of both passes, so that an error shows where it starts."""
    inputs, context = golden.inputs, golden.context
    x, t, hint = inputs["x_noisy"], inputs["t"], inputs["hint"]
    unet, views = denoiser.unet, denoiser.view_consistency
    bank = denoiser.bank(inputs["ref_latent"], t, context)
    residuals = denoiser.view_controlnet(x, hint, t, context)
    taps = {f"bank.{i:02d}": tokens for i, tokens in enumerate(bank)}
    taps |= {f"pose.{i:02d}": residual[:2] for i, residual in enumerate(residuals)}

    hooks = _record("input_blocks", unet.input_blocks, taps)
    hooks += _record("output_blocks", unet.output_blocks, taps)
    hooks += _record("input_blocks_motion_module", (m[-1] for m in views.input_blocks_motion_module), taps)
    hooks += _record("output_blocks_motion_module", (m[-1] for m in views.output_blocks_motion_module), taps)
    hooks.append(unet.middle_block[-1].register_forward_hook(_keep(taps, "middle_block")))
    denoiser.conditional(x, t, context, bank, hint, NUM_VIEWS)
    for hook in hooks:
        hook.remove()

    middle = views.middle_block_motion_module[0]
    hook = middle.register_forward_hook(_keep(taps, "uncond.middle_motion.out", "uncond.middle_motion.in"))
    denoiser.unconditional(x, t, context, NUM_VIEWS)
    hook.remove()
    return {name: sample_tap(tensor) for name, tensor in taps.items()}


def _record(name: str, modules: Iterable[nn.Module], taps: dict[str, Tensor]) -> list:
    return [m.register_forward_hook(_keep(taps, f"{name}.{i:02d}")) for i, m in enumerate(modules)]


def _keep(taps: dict[str, Tensor], output_name: str, input_name: str | None = None):
    def hook(module: nn.Module, arguments: tuple, output: Tensor | tuple) -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # a block of F also gives its tokens
        taps[output_name] = hidden[:2]  # the golden taps hold the first two views
        if input_name is not None:
            taps[input_name] = arguments[0][:2]

    return hook
