"""Start noise that knows the head's layout, and the official sampler as a preset over the host's own."""

from __future__ import annotations

import comfy.sample
import comfy.utils
from comfy_api.latest import io

from ..patches.cross_view_attention import OVERLAP, apply_cross_view_attention
from ..patches.noise import (
    MODES,
    NODE,
    NoNoise,
    ViewNoise,
    empty_views,
    proxy_images,
    proxy_latents,
    repeated_portrait,
    warn_of_zero_terminal_snr,
)
from ..patches.previews import views_callback
from ..patches.run_state import SigmaRange
from ..patches.sampling import (
    CUSTOM,
    GUIDED,
    STARTS,
    chosen_schedule,
    part_of,
    preset_widgets,
    sample_views,
    without_control,
)
from .conditioning import window_inputs
from .input_checks import Node
from .sockets import (
    ADDED,
    ADVANCED,
    SAMPLE,
    Cameras,
    NovelView,
    ViewConsistency,
    chosen_resolution,
    number,
    resolution_input,
    switch,
    whole,
)


def schedule_inputs(presets: dict[str, dict[str, float]], more: str = "") -> list[io.Input]:
    """The widgets that say how to sample, shared by the sampler and the schedule node.

    Args:
        presets: of `preset_widgets`. more: what the tooltip says of those that the other node lacks.
    """
    return [
        io.Combo.Input(
            "preset",
            options=[*presets, CUSTOM],
            extra_dict={"presets": presets},  # for web/presets.js
            tooltip="release: 50 DDIM steps, eta 0.5, as the authors' code. paper: 100 steps. fast: 8 steps of "
            f"DPM-Solver++(2M).{more} custom: DDIM with the steps and eta below.",
        ),
        whole(
            "steps",
            (50, 1, 1000),
            "Denoising steps. Yours to set with preset custom; other presets show what they take.",
        ),
        number(
            "eta",
            (0.5, 0.0, 1.0, 0.01),
            "Fresh noise per step: 0 none (DDIM), 1 ancestral. Yours to set with preset custom; other presets show "
            "what they take.",
        ),
        io.Combo.Input(
            "start",
            options=list(STARTS),
            tooltip="How the start noise is made of proxies and noise: diffused to timestep 999, as the authors do, "
            "or to the first step's own noise level. Noise of mode schedule-matched, and runs that do not start at the "
            "schedule's first step, always take the latter.",
            **ADVANCED,
        ),
    ]


def part_inputs() -> list[io.Input]:
    """Which part of the schedule to run, as KSampler and KSampler (Advanced) have it."""
    return [
        number(
            "denoise",
            (1.0, 0.0, 1.0, 0.01),
            "Below 1, the latents are kept in part: the steps are the last part of a longer schedule, as in KSampler. "
            "0 changes nothing.",
            **ADDED,
        ),
        whole("start_at_step", (0, 0, 10000), "Number of the first step to run, as in KSampler (Advanced).", **ADDED),
        whole(
            "end_at_step", (10000, 0, 10000), "Number of the step to stop before, as in KSampler (Advanced).", **ADDED
        ),
        switch(
            "add_noise",
            True,
            "Off where the latents come with noise, from a run that stopped early; the noise input then gives "
            "its seed only.",
            **ADDED,
        ),
        switch(
            "return_with_leftover_noise",
            False,
            "On where another sampler continues after end_at_step; off, the last step removes all noise.",
            **ADDED,
        ),
    ]


def guided_inputs() -> list[io.Input]:
    """In which part of the schedule guidance acts."""
    return [
        number(
            GUIDED[0],
            (0.0, 0.0, 1.0, 0.01),
            "Guidance (cfg) acts from this part of the schedule on; steps before it are made as with cfg 1, without a "
            "second pass. Preset faster shows what it takes.",
            **ADDED,
        ),
        number(
            GUIDED[1],
            (1.0, 0.0, 1.0, 0.01),
            "Guidance (cfg) acts until this part. Preset faster shows what it takes.",
            **ADDED,
        ),
    ]


class ViewConsistencySampler(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ViewConsistencySampler",
            display_name="View-Consistency Sampler",
            category=SAMPLE,
            description="Denoises all views together, each looking at the others, with the authors' DDIM. The "
            "sampling is the host's own: previews, interrupting and other patches work as in KSampler.",
            search_aliases=["multi-view sampler", "DDIM eta", "novel view sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model, with Apply Reference Attention before it."),
                io.Conditioning.Input("positive", tooltip="From View ControlNet: the prompt with the cameras."),
                io.Latent.Input("latent", tooltip="One latent per view, from 3D-Aware Noise (or empty latents)."),
                io.Noise.Input(
                    "noise",
                    tooltip="From 3D-Aware Noise, whose noise for a view is its own in any batch, or RandomNoise.",
                ),
                ViewConsistency.Input(
                    "view_consistency",
                    optional=True,
                    tooltip="From Load View Consistency. Left open, every view is made on its own.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Left open, the positive's prompt without its cameras, as the authors do it.",
                ),
                number(
                    "cfg",
                    (3.0, 0.0, 30.0, 0.1),
                    "Guidance towards portrait and cameras; 3 in the paper. 1 is twice as fast and weaker.",
                ),
                *schedule_inputs(preset_widgets(), " faster: no more steps, guidance in the noisy half only."),
                *window_inputs(),
                *part_inputs(),
                *guided_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="The views, one latent each, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent,
        noise,
        cfg,
        preset,
        steps,
        eta,
        start,
        view_consistency=None,
        negative=None,
        window_size=0,
        overlap=OVERLAP,
        closed_orbit=False,
        denoise=1.0,
        start_at_step=0,
        end_at_step=10000,
        add_noise=True,
        return_with_leftover_noise=False,
        guided_start_percent=0.0,
        guided_end_percent=1.0,
    ) -> io.NodeOutput:
        parts = dict(zip(GUIDED, (guided_start_percent, guided_end_percent), strict=True))
        parts |= preset_widgets().get(preset, {})
        guided = SigmaRange(*(parts[name] for name in GUIDED))
        if view_consistency is not None:
            model = apply_cross_view_attention(model, view_consistency, window_size, overlap, closed_orbit)
        start = getattr(noise, "start", None) or start
        sampler, sigmas = chosen_schedule(model, preset, steps, eta, start, latent.get("batch_index"), denoise)
        sigmas = part_of(sigmas, start_at_step, end_at_step, return_with_leftover_noise)
        if len(sigmas) == 0:
            return io.NodeOutput(latent)
        noise = noise if add_noise else NoNoise(noise.seed)
        latent = {**latent, "samples": comfy.sample.fix_empty_latent_channels(model, latent["samples"])}
        negative = without_control(positive) if negative is None else negative
        show = {
            "callback": views_callback(model, len(sigmas) - 1),
            "disable_pbar": not comfy.utils.PROGRESS_BAR_ENABLED,
            "guided": guided,
        }
        return io.NodeOutput(sample_views(model, positive, negative, noise, latent, sampler, sigmas, cfg, **show))


class ViewConsistencySchedule(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ViewConsistencySchedule",
            display_name="View-Consistency Schedule",
            category=SAMPLE,
            description="The presets of View-Consistency Sampler that leave guidance to the guider, for the host's "
            "SamplerCustomAdvanced.",
            search_aliases=["DDIM sigmas", "release sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model whose noise levels are used."),
                *schedule_inputs({name: sets for name, sets in preset_widgets().items() if GUIDED[0] not in sets}),
            ],
            outputs=[
                io.Sampler.Output(tooltip="The preset's sampler, with noise of its own for every view."),
                io.Sigmas.Output(tooltip="The preset's timesteps as noise levels, for one run or to be split."),
            ],
        )

    @classmethod
    def execute(cls, model, preset, steps, eta, start) -> io.NodeOutput:
        return io.NodeOutput(*chosen_schedule(model, preset, steps, eta, start))


class ThreeDAwareNoise(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_3DAwareNoise",
            display_name="3D-Aware Noise",
            category=SAMPLE,
            description="Start noise in which the head is already in its place in every view: blurred proxy views, "
            "made by the novel-view model S or brought by you, are encoded, and the sampler adds the noise.",
            search_aliases=["proxy views", "noise initialisation", "novel view model"],
            inputs=[
                io.Vae.Input("vae", tooltip="The base model's VAE."),
                Cameras.Input("cameras", optional=True, tooltip="The views to make, e.g. from Camera Trajectory."),
                NovelView.Input(
                    "novel_view",
                    optional=True,
                    tooltip="From Load Novel-View Model. Not needed with proxies of your own.",
                ),
                io.Image.Input("image", optional=True, tooltip="The portrait, for the novel-view model."),
                Cameras.Input(
                    "reference_camera",
                    optional=True,
                    tooltip="The portrait's own camera, e.g. from Reference View. Left open: straight from the front.",
                ),
                io.Image.Input(
                    "proxies",
                    optional=True,
                    tooltip="Proxy views of your own, one per view, instead of the novel-view model.",
                ),
                resolution_input(
                    "Side of the views in pixels. 0: what the VAE's file says, which is the miniature's own, or 512 "
                    "as for SD1.5 where it says nothing."
                ),
                whole(
                    "seed",
                    (0, 0, 2**64 - 1),
                    "View i's noise depends on this seed and i alone.",
                    control_after_generate=True,
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    tooltip="paper: proxies diffused to timestep 999. schedule-matched: to the sampler's first noise "
                    "level, also where View-Consistency Sampler says t=999. shared: one noise for all views. random: "
                    "noise without proxies, one latent per camera. portrait: the portrait in place of every proxy, as "
                    "the authors do where they have none.",
                    **ADDED,
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Only looked at: a warning if its last timestep leaves nothing of the proxies (zero "
                    "terminal SNR).",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The encoded proxy views, one per view."),
                io.Noise.Output(tooltip="The noise to add to them; also feeds the sampler's steps."),
                io.Image.Output(display_name="proxies", tooltip="The proxy views, to look at."),
            ],
        )

    @classmethod
    def execute(
        cls,
        vae,
        resolution,
        seed,
        cameras=None,
        novel_view=None,
        image=None,
        reference_camera=None,
        proxies=None,
        mode="paper",
        model=None,
    ) -> io.NodeOutput:
        side, noise = chosen_resolution(resolution, vae, NODE), ViewNoise(seed, mode)
        if mode == "portrait":
            novel_view, proxies = None, repeated_portrait(cameras, image)
        if mode == "random":
            latent, images = empty_views(vae, cameras, proxies, side)
            return io.NodeOutput(latent, noise, images)
        if model is not None:
            warn_of_zero_terminal_snr(model.get_model_object("model_sampling"))
        images = proxy_images(cameras, novel_view, image, reference_camera, proxies)
        latent, images = proxy_latents(vae, images, side)
        return io.NodeOutput(latent, noise, images)


NODES = [ViewConsistencySampler, ViewConsistencySchedule, ThreeDAwareNoise]
