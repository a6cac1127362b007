"""The golden tensors through ComfyUI: weights and inputs of `evaluation.goldens.core`, our patches, the host's loop.

Nothing is called that a workflow does not call: every number comes out of a guider's `sample`. Importing this module
imports no ComfyUI; `host_outputs` wants a booted one (see `tools.embedded`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from diffportrait3d.networks import UNetConfig

from .core import NETWORKS, SINGLE_PASSES, TRAJECTORIES
from .data import GOLDEN_CONFIG, PREFIXES, Golden, deterministic_weights

LATENT_SCALE = 0.18215
# For tests of the mechanics: all blocks of SD1.5, a hundredth of its weights, a short positional table.
NARROW_CONFIG = UNetConfig(model_channels=32, context_dim=32, max_views=6)


@lru_cache(maxsize=2)
def known_weights(config: UNetConfig) -> dict[str, dict[str, Tensor]]:
    """Deterministic state dict per network; at GOLDEN_CONFIG the numbers of `core_golden.golden_denoiser`."""
    return {name: deterministic_weights(kind(config), PREFIXES[name]) for name, kind in NETWORKS.items()}


class HostPath:
    """The networks with known weights inside a booted host.

    Args:
        pack: this pack as the host has loaded it.
        comfy: the host's `comfy` package.
        config: width of the networks.
        weights: a state dict per network; None: the known ones.
        metadata: facts as a network file has them, e.g. reference_timestep.
    """

    def __init__(
        self,
        pack: ModuleType,
        comfy: ModuleType,
        config: UNetConfig = GOLDEN_CONFIG,
        weights: Mapping[str, dict[str, Tensor]] | None = None,
        **metadata,
    ):
        self.comfy, self.pack, self.patches = comfy, pack, pack.patches
        weights, loading = weights or known_weights(config), pack.host.loading
        config = pack.diffportrait3d.networks.UNetConfig.from_dict(config.to_dict())
        self.model = loading.build_model(weights["unet"], config, metadata)
        self.encoder = loading.build_reference_encoder(weights["reference_encoder"], config, metadata)
        self.views = loading.build_cross_view_attention(weights["view_consistency"], config, metadata)
        self.control_net = pack.patches.view_controlnet.build_view_controlnet(weights["view_controlnet"], config)

    @classmethod
    def of_files(cls, pack: ModuleType, comfy: ModuleType, folder: Path, model, control_net) -> HostPath:
        """The same around a MODEL and a CONTROL_NET of any loader, F_ref and view consistency from converted files."""
        path = cls.__new__(cls)
        path.comfy, path.pack, path.patches = comfy, pack, pack.patches
        path.model, path.control_net = model, control_net
        path.encoder = pack.host.loading.load_reference_encoder(folder / "reference_encoder.safetensors")
        path.views = pack.host.loading.load_cross_view_attention(folder / "view_consistency.safetensors")
        return path

    def prepare(self, inputs: Mapping[str, Tensor], references: int, control: bool, views: bool):
        """(MODEL, positive CONDITIONING) with the parts asked for."""
        model, positive = self.model, [[inputs["context"], {}]]
        if references:
            latents = [inputs["ref_latent"], inputs["ref_latent2"]][:references]
            portraits = self.references(torch.cat(latents) / LATENT_SCALE)
            model = self.patches.reference.apply_reference_attention(model, self.encoder, portraits)
        if views:
            model = self.patches.cross_view_attention.apply_cross_view_attention(model, self.views)
        if control:
            images = (inputs["hint"].movedim(1, -1) + 1.0) / 2.0
            positive = self.patches.view_controlnet.apply_view_controlnet(positive, self.control_net, images)
        return model, positive

    def references(self, latents: Tensor, mask: Tensor | None = None):
        """Portraits as latents [R, 4, h, w] (not scaled), in place of images that a VAE encodes."""

        def encode(height: int, width: int) -> Tensor:
            if latents.shape[-2:] == (height, width):
                return latents
            return self.comfy.utils.common_upscale(latents, width, height, "bicubic", "center")

        size = tuple(latents.shape[-2:])
        return self.patches.reference_inputs.References(len(latents), size, encode, mask)

    def predict(self, inputs: Mapping[str, Tensor], references: int, control: bool, views: bool, scale: float):
        """eps [8, 4, h, w] of one evaluation at the golden timestep."""
        model, positive = self.prepare(inputs, references, control, views)
        model_sampling = model.get_model_object("model_sampling")
        sigmas = model_sampling.sigmas[inputs["t"][:1].long()].repeat(2)
        latent = {"samples": torch.zeros_like(inputs["x_noisy"])}
        return LATENT_SCALE * self._sample(
            model, positive, inputs, GivenNoise(inputs["x_noisy"]), latent, self._probe(), sigmas, scale
        )

    def residuals(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """What the ControlNet adds at the golden timestep: 12 skip residuals and the middle one, each [8, C, h, w]."""
        outputs: list[dict[str, list[Tensor]]] = []
        hook = self.control_net.control_model.register_forward_hook(
            lambda module, arguments, output: outputs.append({k: [t.clone() for t in v] for k, v in output.items()})
        )
        try:
            self.predict(inputs, 0, True, False, 1.0)
        finally:
            hook.remove()
        return [*outputs[0]["output"], *outputs[0]["middle"]]

    def trajectory(self, inputs: Mapping[str, Tensor], eta: float, steps: int = 5) -> dict[str, Tensor]:
        """The release's sampler in the host's loop: "x" [steps+1, 8, 4, h, w], "pred_x0" [steps, ...], "timesteps"."""
        model, positive = self.prepare(inputs, 1, True, True)
        sampling = self.patches.sampling
        sigmas = sampling.ddim_sigmas(model.get_model_object("model_sampling"), steps)
        noises = inputs["ddim_noise"]
        sampler = sampling.DDIMSampler(eta, step_noise=lambda step, x: noises[step].to(x))
        states, predictions = [], []

        def record(step, x0, x, total):
            states.append((x / torch.sqrt(1 + sigmas[step] ** 2)).cpu())
            predictions.append(x0.cpu())

        latent = {"samples": inputs["proxy_latent"] / LATENT_SCALE}
        noise = GivenNoise(inputs["q_noise"])
        result = self._sample(model, positive, inputs, noise, latent, sampler, sigmas, 3.0, record)
        states.append(LATENT_SCALE * result)
        timesteps = model.get_model_object("model_sampling").timestep(sigmas[:-1])
        return {"x": torch.stack(states), "pred_x0": torch.stack(predictions), "timesteps": timesteps}

    def _sample(self, model, positive, inputs, noise, latent, sampler, sigmas, scale, callback=None) -> Tensor:
        negative = [[inputs["context"], {}]]  # the release gives both passes the same text
        result = self.patches.sampling.sample_views(
            model, positive, negative, noise, latent, sampler, sigmas, scale, callback
        )
        return result["samples"]

    def _probe(self):
        class Probe(self.comfy.samplers.Sampler):
            """Evaluates the guided model once and returns the noise it predicts."""

            def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
                x = noise * torch.sqrt(1 + sigmas[0] ** 2)
                denoised = model_wrap(x, sigmas[0].expand(x.shape[0]), **extra_args)
                return (x - denoised) / sigmas[0]

        return Probe()


class GivenNoise:
    """NOISE object that returns a given tensor."""

    seed = 0

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def generate_noise(self, latent: dict) -> Tensor:
        return self.tensor.clone()


@lru_cache(maxsize=4)
def host_path(pack: ModuleType, comfy: ModuleType, config: UNetConfig = GOLDEN_CONFIG) -> HostPath:
    """The same HostPath for every caller: its networks are only read."""
    return HostPath(pack, comfy, config)


@torch.inference_mode()
def host_outputs(pack: ModuleType, comfy: ModuleType, golden: Golden) -> dict[str, Tensor]:
    """Every golden output computed through the host, under its golden name."""
    path = host_path(pack, comfy)
    outputs = {name: path.predict(golden.inputs, *parts) for name, parts in SINGLE_PASSES.items()}
    for name, eta in TRAJECTORIES.items():
        outputs |= {f"{name}.{part}": tensor for part, tensor in path.trajectory(golden.inputs, eta).items()}
    return outputs
