"""Features whose size another patch changes inside of the UNet, during a part of a run or all of it.

Deep Shrink (PatchModelAddDownscale) and its relatives resize the hidden states after a block and back again later,
without notice: what is read or added there has to look at the actual size.
"""

from __future__ import annotations

from collections.abc import Callable

from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.nn.functional import interpolate

from .run_state import RunPatch

KEY = "diffportrait3d.residuals"
SKIP, AFTER_SKIP, OUTPUT = "input_block_patch", "input_block_patch_after_skip", "output_block_patch"


def resize_features(features: Tensor, height: int, width: int) -> Tensor:
    """Features [N, C, h, w] -> [N, C, height, width]; themselves if they have that size."""
    if features.shape[-2:] == (height, width):
        return features
    return interpolate(features.float(), (height, width), mode="bilinear", antialias=True).to(features)


def resizing_patches(patches: dict[str, list]) -> dict[str, list]:
    """The block patches of other packs in a UNet call's `patches`, which then do nothing but resize features."""
    return {
        name: [_only_resizing(patch) for patch in patches[name] if not isinstance(patch, RunPatch)]
        for name in (SKIP, AFTER_SKIP, OUTPUT)
        if name in patches
    }


def _only_resizing(patch: Callable) -> Callable:
    """A block patch that acts where it resizes features [N, C, h, w], and nowhere else."""

    def resize(h: Tensor, *skip_and_options):
        *skip, options = skip_and_options  # the skip connection comes in the output blocks only
        made = patch(h.clone(), *(each.clone() for each in skip), options)
        resized = made[0] if skip else made
        h = h if resized.shape[-2:] == h.shape[-2:] else resized
        return (h, *skip) if skip else h

    return resize


def fit_residuals(options: dict) -> None:
    """Lets one UNet call, the one with these transformer `options`, add the residuals of its ControlNets at the size of
    the features. The host leaves out what does not fit, with a warning per block and step.
    """
    wrappers = options.setdefault("wrappers", {}).setdefault(WrappersMP.DIFFUSION_MODEL, {})
    wrappers.setdefault(KEY, [_with_fitted_residuals])


def _with_fitted_residuals(
    executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, *args, **kwargs
):
    if control is not None:
        fitted = FittedResiduals(control, len(executor.class_obj.input_blocks))
        patches = transformer_options.get("patches", {})
        last = {SKIP: fitted.at_skip, AFTER_SKIP: fitted.at_middle}  # after what may resize
        patches = {**patches, **{name: [*patches.get(name, ()), patch] for name, patch in last.items()}}
        transformer_options = {**transformer_options, "patches": patches}
    return executor(x, timesteps, context, y, control, transformer_options, *args, **kwargs)


class FittedResiduals:
    """The residuals of one UNet call, each resized when it is known what it will be added to.

    Args:
        control: what the host's ControlNets give, {"output": one residual per skip connection, "middle": one}; None
            means no residual. The host takes both lists from the end.
        blocks: input blocks of the UNet.
    """

    def __init__(self, control: dict[str, list[Tensor | None]], blocks: int):
        self.control, self.blocks = control, blocks

    def at_skip(self, h: Tensor, options: dict) -> Tensor:
        """input_block_patch: h [N, C, H, W] is the skip connection of a block."""
        self._fit("output", self.blocks - options["block"][1], h)
        return h

    def at_middle(self, h: Tensor, options: dict) -> Tensor:
        """input_block_patch_after_skip: after the last block h [N, C, H, W] has the size of the middle."""
        if options["block"][1] == self.blocks - 1:
            self._fit("middle", 1, h)
        return h

    def _fit(self, part: str, from_end: int, h: Tensor) -> None:
        residuals = self.control.get(part, [])
        if from_end <= len(residuals) and residuals[-from_end] is not None:
            residuals[-from_end] = resize_features(residuals[-from_end], *h.shape[-2:])
