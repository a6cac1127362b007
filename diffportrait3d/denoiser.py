"""The frozen UNet and the three networks around it, as the method evaluates them together."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .choices import check_choice
from .networks import CrossViewAttention, ReferenceEncoder, UNet, ViewControlNet, join_references

REFERENCE_TIMESTEPS = ("current", "zero")
MIDDLE_VIEW_ATTENTION = ("unconditional", "always", "never")
GUIDANCE = 3.0  # paper, section 4.1


class Denoiser(nn.Module):
    """F with F_ref, F_cam and cross-view attention (paper Figure 2a); a part that is missing plays no part.

    Args:
        reference_timestep: the timestep F_ref is given: that of the step being denoised ("current", the release) or 0
            ("zero", so that the bank is the same at every step).
        middle_view_attention: in which pass the middle block's cross-view module runs; the release's: unconditional.
    """

    def __init__(
        self,
        unet: UNet,
        reference_encoder: ReferenceEncoder | None = None,
        view_controlnet: ViewControlNet | None = None,
        view_consistency: CrossViewAttention | None = None,
        reference_timestep: str = "current",
        middle_view_attention: str = "unconditional",
    ):
        super().__init__()
        check_choice("reference_timestep", reference_timestep, REFERENCE_TIMESTEPS)
        check_choice("middle_view_attention", middle_view_attention, MIDDLE_VIEW_ATTENTION)
        self.unet = unet
        self.reference_encoder = reference_encoder
        self.view_controlnet = view_controlnet
        self.view_consistency = view_consistency
        self.reference_timestep = reference_timestep
        self.middle_view_attention = middle_view_attention

    def with_networks(self, **networks: nn.Module | None) -> Denoiser:
        """One that shares these networks but for those given, under the names of the arguments; None leaves one out."""
        own: dict[str, Any] = {name: getattr(self, name) for name in inspect.signature(Denoiser).parameters}
        own.update(networks)
        return Denoiser(**own)

    def bank(self, reference_latents: Tensor, t: Tensor, context: Tensor, people: int = 1) -> list[Tensor] | None:
        """Tokens of R references of one person, joined (paper eq. 5), or of each of P people; None without F_ref.

        Args:
            reference_latents: clean scaled latents [P*R, 4, h, w].
            t: timestep of the step [1] or [N]; the first entry counts.
            context: [1 or N, L, C]; the first row counts.

        Returns:
            16 tensors [P, R*M, C]
        """
        if self.reference_encoder is None:
            return None
        count = reference_latents.shape[0]
        t = t[:1].expand(count) * (self.reference_timestep == "current")
        tokens = self.reference_encoder(reference_latents, t, context[:1].expand(count, -1, -1))
        return join_references(tokens, people)

    def conditional(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        bank: Sequence[Tensor] | None = None,
        camera_images: Tensor | None = None,
        num_views: int | None = None,
    ) -> Tensor:
        """Noise predicted with appearance (bank), camera (images in [-1, 1]) and the other views; eps [N, 4, h, w]."""
        residuals = None
        if camera_images is not None and self.view_controlnet is not None:
            residuals = self.view_controlnet(x, camera_images, t, context)
        middle = self.middle_view_attention == "always"
        return self._views(x, t, context, num_views, middle, bank=bank, residuals=residuals)

    def unconditional(self, x: Tensor, t: Tensor, context: Tensor, num_views: int | None = None) -> Tensor:
        """Noise predicted from the text alone: no reference and no camera, as in the release; eps [N, 4, h, w]."""
        return self._views(x, t, context, num_views, self.middle_view_attention != "never")

    def _views(self, x: Tensor, t: Tensor, context: Tensor, num_views: int | None, middle: bool, **inputs) -> Tensor:
        views = {"cross_view": self.view_consistency, "num_views": num_views, "cross_view_in_middle": middle}
        return self.unet(x, t, context, **views, **inputs)

    def guided(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        bank: Sequence[Tensor] | None,
        camera_images: Tensor | None,
        num_views: int | None = None,
        scale: float = GUIDANCE,
    ) -> Tensor:
        """Classifier-free guidance over appearance (`bank` at this timestep) and camera together; eps [N, 4, h, w]."""
        conditional = self.conditional(x, t, context, bank, camera_images, num_views)
        if scale == 1.0:
            return conditional
        unconditional = self.unconditional(x, t, context, num_views)
        return unconditional + scale * (conditional - unconditional)
