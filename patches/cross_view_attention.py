"""View consistency (paper section 3.4): attention among the views after every block of the host's UNet.

Where the modules act, and by which hook, without moving a single state-dict key:
- after input blocks 1..11: `input_block_patch`, so that skip connections carry the result;
- after the complete output blocks 0..11: an empty module appended to the block while the model is loaded
  (`PatcherInjection`); its handler does the work, elsewhere it is the identity;
- in the middle block, between the transformer and the last ResBlock: a handler for that ResBlock.

More views than the modules were trained with are denoised in overlapping windows (`view_windows`), unless the MODEL
brings context windows of the host, which are respected.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.patcher_extension import PatcherInjection
from torch import Tensor, nn

from ..diffportrait3d.denoiser import MIDDLE_VIEW_ATTENTION
from ..diffportrait3d.views import check_window
from ..diffportrait3d.weights.files import views_of
from ..host.compatibility import check_same_width
from ..host.loading import HostNetwork
from .run_state import RunPatch, RunState, views_per_call
from .view_windows import ViewWindows, skip_self_attention_guidance, warn_of_easy_cache

KEY = "diffportrait3d.view_consistency"
CALL = f"{KEY}.call"  # the patch's `call_key`
OVERLAP = 2
ANIMATEDIFF = "ADE"  # under this name AnimateDiff-Evolved keeps its motion models on a MODEL


class OutputBlockEnd(nn.Module):
    """Marks the end of an output block; what happens there is in the transformer options of the call."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, h: Tensor) -> Tensor:
        return h


def append_sites(patcher) -> None:
    for index, block in enumerate(patcher.model.diffusion_model.output_blocks):
        block.append(OutputBlockEnd(index))


def remove_sites(patcher) -> None:
    for block in patcher.model.diffusion_model.output_blocks:
        if isinstance(block[-1], OutputBlockEnd):
            del block[-1]


@dataclass
class ViewCall:
    """One call of the UNet: the modules, the views per condition, and the conditions whose middle is mixed."""

    network: nn.Module
    middle_end: nn.Module
    views: int
    middle_chunks: list[bool]

    def attend(self, module: Callable[..., Tensor], *place_and_features) -> Tensor:
        """Features h [chunks*V, C, H, W] after one of the network's modules, which may compute in another dtype."""
        *place, h = place_and_features
        return module(*place, h.to(self.network.compute_dtype), self.views).to(h.dtype)

    def mix_middle(self, h: Tensor) -> Tensor:
        """h [chunks*V, C, H, W], mixed in the chosen chunks."""
        chunks = [
            self.attend(self.network.after_middle_transformer, chunk) if chosen else chunk
            for chunk, chosen in zip(h.split(self.views), self.middle_chunks, strict=True)
        ]
        return torch.cat(chunks)


def after_output_block(site: OutputBlockEnd, h: Tensor, emb, context, transformer_options: dict, *args) -> Tensor:
    call: ViewCall | None = transformer_options.get(CALL)
    return h if call is None else call.attend(call.network.after_output, site.index, h)


def mix_before_last_middle_layer(layer: ResBlock, h: Tensor, emb: Tensor, context, transformer_options: dict, *args):
    call: ViewCall | None = transformer_options.get(CALL)
    if call is not None and layer is call.middle_end and any(call.middle_chunks):
        h = call.mix_middle(h)
    return layer(h, emb)


class CrossViewPatch(RunPatch):
    """View consistency on one MODEL."""

    label = "View consistency"

    def __init__(self, max_views: int, middle: str, window: int, overlap: int, closed: bool):
        super().__init__(KEY)
        self.max_views, self.middle = max_views, middle
        self.window, self.overlap, self.closed = window, overlap, closed

    def attach(self, model, network_patcher) -> None:
        super().attach(model, network_patcher)
        model.set_model_input_block_patch(self)
        model.set_injections(KEY, [PatcherInjection(append_sites, remove_sites)])
        model.set_model_patch((OutputBlockEnd, after_output_block), "forward_timestep_embed_patch")
        if self.middle != "never":
            model.set_model_patch((ResBlock, mix_before_last_middle_layer), "forward_timestep_embed_patch")

    def begin(self, guider, noise: Tensor) -> RunState:
        refuse_animatediff(guider.model_patcher)
        run = super().begin(guider, noise)
        run.middle = self.middle
        self.check_views(views_per_call(run.views, guider.model_options))
        return run

    def _outer_sample(self, executor, noise: Tensor, *args, **kwargs):
        """The run, with windows around it if there are more views than one window holds."""
        options = executor.class_obj.model_options
        if noise.shape[0] <= self.window or options.get("context_handler") is not None:
            return super()._outer_sample(executor, noise, *args, **kwargs)
        skip_self_attention_guidance(options)
        warn_of_easy_cache(options)
        logging.info(f"{self.label}: {noise.shape[0]} views in windows of {self.window}, overlap {self.overlap}.")
        options["context_handler"] = ViewWindows(self.window, self.overlap, self.closed)
        try:
            return super()._outer_sample(executor, noise, *args, **kwargs)
        finally:
            del options["context_handler"]

    def extra_rows(self, run: RunState, model_options: dict) -> int:
        """One window of views is in memory at a time; what other patches have added stays."""
        windows = isinstance(model_options.get("context_handler"), ViewWindows)
        return views_per_call(run.views, model_options) - run.views if windows else 0

    def check_views(self, views: int) -> None:
        if views < 2:
            raise ValueError(
                "View consistency needs at least 2 views in one batch, got 1; ask for more views or leave it out."
            )
        if views > self.max_views:
            raise ValueError(
                f"View consistency reaches {self.max_views} views at once (the length of its positional table), got "
                f"{views}; make the context windows smaller, or take them off and set window_size instead."
            )

    def begin_call(self, run: RunState, unet, x, timesteps, context, options: dict) -> ViewCall:
        views = len(x) // len(run.positive)
        self.check_views(views)
        middle = [run.middle == "always" or (run.middle == "unconditional" and not p) for p in run.positive]
        return ViewCall(run.network, unet.middle_block[-1], views, middle)

    def __call__(self, h: Tensor, transformer_options: dict) -> Tensor:
        """input_block_patch of the host: after block `block`, before its skip connection is stored."""
        index = transformer_options["block"][1]
        call: ViewCall = transformer_options[CALL]
        return h if index == 0 else call.attend(call.network.after_input, index, h)


def refuse_animatediff(model) -> None:
    """Raises ValueError if AnimateDiff-Evolved has put a motion model on `model`, which takes the same batch for frames
    of a video. Its sampling node without one does not."""
    if ANIMATEDIFF in model.additional_models:
        raise ValueError(
            "View consistency and AnimateDiff cannot share a MODEL: one takes the batch for views, the other for "
            "frames; take one of them off this MODEL."
        )


def apply_cross_view_attention(
    model, network: HostNetwork, window_size: int = 0, overlap: int = OVERLAP, closed_orbit: bool = False
):
    """A clone of MODEL `model` in which the views of a batch attend to each other.

    Args:
        window_size: views that attend to each other at once; more views are denoised in overlapping windows, placed
            elsewhere at every step. 0 takes the number the modules were trained with.
        overlap: views that neighbouring windows share at least.
        closed_orbit: the last view is the neighbour of the first.

    Raises:
        ValueError: other width than the model, view consistency or AnimateDiff is on it already, or a window that the
            modules' positional table cannot hold or that is not larger than its overlap.
    """
    check_same_width(model, network)
    refuse_animatediff(model)
    if KEY in model.additional_models:
        raise ValueError("This MODEL already has view consistency; apply it once.")
    middle = network.metadata.get("middle_view_attention", "unconditional")
    if middle not in MIDDLE_VIEW_ATTENTION:
        raise ValueError(f"{network.path}: middle_view_attention is {middle!r}, not one of {MIDDLE_VIEW_ATTENTION}.")
    longest = network.config.max_views
    if window_size > longest:
        raise ValueError(
            f"window_size {window_size} is more than the {longest} views the module's positional table holds; "
            f"choose 2 to {longest}, or 0 for the module's own."
        )
    window = window_size or trained_views(network)
    check_window(window, overlap)
    patched = model.clone()
    CrossViewPatch(longest, middle, window, overlap, closed_orbit).attach(patched, network.patcher)
    return patched


def trained_views(network: HostNetwork) -> int:
    """Views per group in the training, as the file says; without that, as many as the positional table holds."""
    return min(views_of(network.metadata) or network.config.max_views, network.config.max_views)
