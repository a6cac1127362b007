"""Guided steps of the real ComfyUI with networks of any width and random weights: what a bench runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffportrait3d.networks import UNetConfig

from ..goldens.core import NETWORKS
from ..goldens.host import GivenNoise, HostPath
from .tape import OperatorTape, clock

WIDTHS = {
    "tiny": UNetConfig(model_channels=32, context_dim=32),
    "miniature": UNetConfig(model_channels=64, context_dim=64),
    "sd15": UNetConfig(),
}


@dataclass(frozen=True)
class Part:
    """What takes part in a step: F_ref, F_cam, view consistency, and the unconditional pass."""

    reference: bool = True
    camera: bool = True
    views: bool = True
    guidance: float = 3.0


PARTS = {
    "all": Part(),
    "without reference": Part(reference=False),
    "without F_cam": Part(camera=False),
    "without view consistency": Part(views=False),
    "F alone": Part(reference=False, camera=False, views=False),
    "all, no guidance": Part(guidance=1.0),
}


def random_weights(config: UNetConfig, dtype: torch.dtype, filled: bool) -> dict[str, dict[str, Tensor]]:
    """A state dict per network; `filled` with small numbers, or as they come from memory."""
    weights = {}
    for kind, network in NETWORKS.items():
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in network(config).state_dict().items()}
        tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        if filled:
            for tensor in tensors.values():
                tensor.normal_(0.0, (tensor.numel() // len(tensor)) ** -0.5)
        weights[kind] = tensors
    return weights


class BenchPath(HostPath):
    """The host with networks of one width.

    Args:
        half: in half precision, and with the host's estimate of memory for a GPU, whatever the device.
        free: bytes that a card has besides the weights, for the host's choice whether both sides of guidance fit into
            one call; None: as many as it takes.
        compiled: the MODEL as the host's TorchCompileModel gives it; None: as it is.
    """

    def __init__(
        self,
        pack,
        comfy,
        weights,
        config: UNetConfig,
        half: bool,
        free: float | None = None,
        compiled: Callable | None = None,
    ):
        super().__init__(pack, comfy, config, weights)
        self.config, self.compiled, self.counted = config, compiled, compiled is None
        if half:  # a CPU of the host would compute in float32

            def memory_required(shape, **_) -> float:
                needed = shape[0] * math.prod(shape[2:]) * 2 * 0.01 * 2**20  # the host's, with flash attention
                here = comfy.model_management.get_free_memory(torch.device("cpu"))
                return 0.0 if free is None else needed * here / free

            self.model.model.memory_required = memory_required
            self.model.model.manual_cast_dtype = self.control_net.manual_cast_dtype = None
            self.encoder.patcher.model.compute_dtype = self.views.patcher.model.compute_dtype = torch.float16

    def run(self, part: Part, views: int, side: int, steps: int, on_step: Callable[[int], object]) -> Tensor:
        """Samples `views` views of side x side pixels with the release's sampler; `on_step` is called with
        a step's number after it.

        Returns:
            latents [views, 4, side/8, side/8]
        """
        generator, latent_side = torch.Generator().manual_seed(0), side // 8
        inputs = {
            "context": torch.zeros(1, 77, self.config.context_dim),
            "ref_latent": torch.randn(1, 4, latent_side, latent_side, generator=generator),
            "ref_latent2": torch.zeros(0, 4, latent_side, latent_side),
            "hint": torch.rand(views, 3, side, side, generator=generator) * 2 - 1,
        }
        model, positive = self.prepare(inputs, int(part.reference), part.camera, part.views)
        if self.compiled:
            model = self.compiled(model)
        sampling = self.patches.sampling
        latents = torch.randn(views, 4, latent_side, latent_side, generator=generator)
        return sampling.sample_views(
            model,
            positive,
            [[inputs["context"], {}]],
            GivenNoise(torch.randn(latents.shape, generator=generator)),
            {"samples": latents},
            sampling.DDIMSampler(0.5),
            sampling.ddim_sigmas(model.get_model_object("model_sampling"), steps),
            part.guidance,
            lambda step, *_: on_step(step),
        )["samples"]

    def networks(self) -> list[nn.Module]:
        """Those that a step calls; view consistency runs inside of the first."""
        return [self.model.model.diffusion_model, self.encoder.patcher.model, self.control_net.control_model]

    def step_seconds(self, part: Part, views: int, side: int, steps: int) -> list[float]:
        """Seconds of every step but the first, which loads and warms up; on a CPU those of this process alone."""
        times: list[float] = []

        with torch.inference_mode():  # as the host runs a workflow
            self.run(part, views, side, steps + 1, lambda _: times.append(clock()))
        return [end - start for start, end in zip(times, times[1:], strict=False)]

    def operator_seconds(self, part: Part, views: int, side: int, plays: int) -> list[float]:
        """Seconds of the operators of one step without the Python around them, `plays` times."""
        tape = OperatorTape()
        with torch.inference_mode():
            with tape:
                self.run(part, views, side, 3, lambda step: setattr(tape, "recording", step == 0))
            return [tape.play() for _ in range(plays + 1)][1:]


def weight_bytes(weights: dict[str, dict[str, Tensor]]) -> dict[str, int]:
    """Of each network."""
    return {kind: sum(tensor.nbytes for tensor in tensors.values()) for kind, tensors in weights.items()}
