"""The method from a portrait to novel views in plain torch, in the order of the paper's Figure 2.

    pipeline = Pipeline.from_folder("weights/miniature")
    views = pipeline(portrait, trajectory("arc", 16))  # portrait [1, 3, H, W] -> views [16, 3, S, S], in [0, 1]

The command `python -m diffportrait3d` and the evaluation run this; inside ComfyUI the host's own UNet, ControlNet and
samplers do the same work with patches, and tests hold both to the same numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cameras.labels import orbit_camera
from .choices import check_choice
from .denoiser import GUIDANCE, Denoiser
from .diffusion import ETA, Schedule, ddim_sample, dpmpp_2m_sample, start_noise, view_noise
from .networks import AutoencoderKL, NovelViewModel
from .synthetic_heads import render_camera_images
from .views import view_windows, window_weights
from .weights.files import load_network, views_of

SOLVERS = ("dpmpp_2m", "ddim")
STARTS = ("proxies", "independent", "shared")
WINDOW = 8  # views that attend to each other, where the weights don't say how many they were trained with
WINDOW_OVERLAP = 2  # views that neighbouring windows share


@dataclass(frozen=True)
class Sampling:
    """How the views are denoised.

    Attributes:
        steps: of the solver.
        solver: one of SOLVERS.
        eta: fresh noise per step, of DDIM alone.
        guidance: scale of classifier-free guidance over appearance and camera together; 1 runs no second pass.
        guided: timesteps at which guidance acts, from the first to before the second; the others run no second pass
            (Kynkaanniemi et al. 2024).
        posed: timesteps at which F_cam acts, given likewise; the others do not run it.
        reference_timestep: F_ref is read once, as of this timestep; None: anew at every step.
        window: views that attend to each other; None: as many as the weights were trained with.
        overlap: views that neighbouring windows share.
        closed: the last view is the neighbour of the first.
    """

    steps: int = 8
    solver: str = "dpmpp_2m"
    eta: float = ETA
    guidance: float = GUIDANCE
    guided: tuple[int, int] = (0, 1000)
    posed: tuple[int, int] = (0, 1000)
    reference_timestep: int | None = None
    window: int | None = None
    overlap: int = WINDOW_OVERLAP
    closed: bool = False

    def __post_init__(self):
        check_choice("solver", self.solver, SOLVERS)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}.")


PRESETS = {
    "release": Sampling(50, "ddim"),  # the authors' code
    "paper": Sampling(100, "ddim"),  # which is silent on eta
    "fast": Sampling(8),
    "faster": Sampling(6, guided=(500, 1000)),  # docs/speed.md: what it costs
}


@dataclass(frozen=True)
class Person:
    """What the networks are given of one person; all views in the order of `views`.

    Attributes:
        start: latents at the last timestep [V, 4, h, w].
        references: clean latents [R, 4, h, w] for F_ref.
        camera_images: [V, 3, S, S] in [-1, 1] for F_cam.
        seed: of the noise.
        views: their numbers, from 0; view i's noise depends on the seed and i alone.
    """

    start: Tensor
    references: Tensor
    camera_images: Tensor
    seed: int
    views: Sequence[int]


class Pipeline:
    """All networks of the method in float32, and what turns a portrait into views.

    Args:
        denoiser: F with F_ref, F_cam and view consistency; what it lacks plays no part.
        autoencoder: between images and latents.
        novel_view: S, which draws the proxy views.
        schedule: that F was trained with.
        window: views that attend to each other at once; more are denoised in overlapping windows.
        device: where the networks run; images are given and returned on the CPU.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: AutoencoderKL,
        novel_view: NovelViewModel,
        schedule: Schedule,
        window: int = WINDOW,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        self.denoiser = denoiser.to(self.device).eval()
        self.autoencoder = autoencoder.to(self.device).eval()
        self.novel_view = novel_view.to(self.device).eval()
        self.schedule, self.window = schedule, window
        self.resolution = novel_view.config.image_size

    @classmethod
    def from_folder(cls, folder: str | Path, device: torch.device | str = "cpu") -> Pipeline:
        """The networks of a folder that holds `<network>.safetensors` for all six of them.

        Raises:
            CheckpointError: a network is missing, damaged or of another kind.
        """
        networks, facts = {}, {}
        for kind in ("unet", "reference_encoder", "view_controlnet", "view_consistency", "autoencoder", "novel_view"):
            networks[kind], facts[kind] = load_network(Path(folder) / f"{kind}.safetensors", expect=kind)
        autoencoder, novel_view = networks.pop("autoencoder"), networks.pop("novel_view")
        views = facts["view_consistency"]
        denoiser = Denoiser(
            **networks,
            reference_timestep=facts["reference_encoder"].get("reference_timestep", "current"),
            middle_view_attention=views.get("middle_view_attention", "unconditional"),
        )
        schedule = Schedule(linear_end=facts["unet"].get("linear_end", 0.012))
        return cls(denoiser, autoencoder, novel_view, schedule, views_of(views) or WINDOW, device)

    def with_networks(self, **networks: nn.Module | None) -> Pipeline:
        """A pipeline that shares this one's networks but for those given, under the names of `Denoiser`'s arguments.

        None leaves a network out: `pipeline.with_networks(view_consistency=None)` makes every view by itself.
        """
        denoiser = self.denoiser.with_networks(**networks)
        return Pipeline(denoiser, self.autoencoder, self.novel_view, self.schedule, self.window, self.device)

    def __call__(
        self,
        portrait: Tensor,
        cameras: Tensor,
        *,
        sampling: Sampling | None = None,
        progress: Callable[[int, int], object] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The person of `portrait` as seen by `cameras`.

        Args:
            portrait, cameras, inputs: as of `person`.
            sampling: solver, guidance and windows; None is the default of `Sampling`.
            progress: called as (finished steps, all steps).

        Returns:
            views [V, 3, S, S] in [0, 1] on the CPU, S the size that the networks were trained at

        Raises:
            ValueError: an unknown `start`, or shapes that do not fit each other.
        """
        return self.views([self.person(portrait, cameras, **inputs)], sampling or Sampling(), progress)[0]

    @torch.inference_mode()
    def person(
        self,
        portrait: Tensor,
        cameras: Tensor,
        *,
        portrait_camera: Tensor | None = None,
        references: Tensor | None = None,
        camera_images: Tensor | None = None,
        proxies: Tensor | None = None,
        start: str = "proxies",
        strength: float = 1.0,
        order: Tensor | None = None,
        seed: int = 0,
    ) -> Person:
        """Everything that the networks are given of a person.

        Args:
            portrait: [R, 3, H, W] in [0, 1]; S reads the first image alone.
            cameras: EG3D labels [V, 25] (see `cameras`).
            portrait_camera: of the first image, [25]; None is straight from the front.
            references: images [R, 3, h, w] in [0, 1] for F_ref; None takes the portrait's.
            camera_images: somebody else at the cameras, [V, 3, h, w] in [0, 1], for F_cam; None renders a head.
            proxies: views [V, 3, h, w] in [0, 1] for the start noise; None takes those that S draws.
            start: what the views are denoised from: diffused "proxies" (section 3.4), or Gaussian noise, "independent"
                or "shared" by all views.
            strength: factor of the proxies' latents.
            order: in which the networks are given the views, a permutation [V]; None: as they come.
            seed: view i's noise depends on it and i alone.

        Raises:
            ValueError: an unknown `start`, or shapes that do not fit each other.
        """
        check_choice("start", start, STARTS)
        if cameras.ndim != 2 or not len(cameras):
            raise ValueError(f"cameras must be labels [V, 25] of at least one view, got {tuple(cameras.shape)}.")
        portrait, cameras = self.fit(portrait), cameras.float()
        # appearance, for F_ref
        reference_latents = self.encode(portrait if references is None else self.fit(references))
        # camera, for F_cam
        if camera_images is None:
            camera_images = render_camera_images(cameras, self.resolution)
        # layout, in the start noise
        if start != "proxies":
            proxies = None
        elif proxies is None:
            proxies = self.proxies(portrait, cameras, portrait_camera)
        for name, images in (("camera_images", camera_images), ("proxies", proxies)):
            if images is not None and len(images) != len(cameras):
                raise ValueError(f"{len(images)} {name} for {len(cameras)} cameras; give one per camera.")
        views = [0] * len(cameras) if start == "shared" else range(len(cameras))
        latents = view_noise(seed, views, reference_latents.shape[1:]).to(self.device)
        if proxies is not None:
            latents = start_noise(strength * self.encode(self.fit(proxies)), latents, self.schedule)
        camera_images = self.fit(camera_images).to(self.device) * 2 - 1
        order = torch.arange(len(cameras)) if order is None else order
        return Person(latents[order], reference_latents, camera_images[order], seed, order.tolist())

    @torch.inference_mode()
    def views(
        self, people: Sequence[Person], sampling: Sampling, progress: Callable[[int, int], object] | None = None
    ) -> list[Tensor]:
        """The views [V, 3, S, S] of each person, 0 first; all people in the same calls of the denoiser."""
        denoised = self.denoise(people, sampling, progress)  # [P, V, 4, h, w]
        return [
            self.decode(latents[torch.tensor(person.views).argsort()])
            for person, latents in zip(people, denoised, strict=True)
        ]

    def fit(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] cut to their central square and resized to the networks' size [N, 3, S, S]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [N, 3, H, W], got {tuple(images.shape)}.")
        height, width = images.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = images[..., top : top + side, left : left + side]
        if side == self.resolution:
            return square
        if side > self.resolution:
            return F.interpolate(square, self.resolution, mode="area").clamp(0, 1)
        return F.interpolate(square, self.resolution, mode="bicubic", align_corners=False).clamp(0, 1)

    def proxies(self, portrait: Tensor, cameras: Tensor, portrait_camera: Tensor | None = None) -> Tensor:
        """S's blurry views of the first portrait [R, 3, S, S] at cameras [V, 25]: [V, 3, S, S] in [0, 1]."""
        count = len(cameras)
        known = orbit_camera(0.0, 0.0) if portrait_camera is None else portrait_camera.float()
        source = portrait[:1].expand(count, -1, -1, -1) * 2 - 1
        labels = known.expand(count, -1), cameras
        return (self.novel_view(source.to(self.device), *(label.to(self.device) for label in labels)).cpu() + 1) / 2

    def encode(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] on the CPU -> scaled latents [N, 4, h, w] on the device."""
        return self.autoencoder.encode(images.to(self.device) * 2 - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [N, 4, h, w] on the device -> images [N, 3, H, W] in [0, 1] on the CPU."""
        return ((self.autoencoder.decode(latents) + 1) / 2).clamp(0, 1).cpu()

    def denoise(
        self, people: Sequence[Person], sampling: Sampling, progress: Callable[[int, int], object] | None = None
    ) -> Tensor:
        """Latents of the views from their start noise, a person's views all together or window by window.

        Args:
            people: P of them, with equal numbers of views V and of references.
            sampling, progress: as in the call.

        Returns:
            latents [P, V, 4, h, w], in the order that the networks were given
        """
        number, count, denoiser = len(people), len(people[0].views), self.denoiser
        start, references = (torch.cat([getattr(p, name) for p in people]) for name in ("start", "references"))
        camera_images = torch.stack([person.camera_images for person in people], 1)  # [V, P, 3, S, S]
        context = start.new_zeros(len(start), 1, denoiser.unet.config.context_dim)  # the networks' empty prompt
        window = count if denoiser.view_consistency is None else sampling.window or self.window
        steps = itertools.count()

        def bank(t: Tensor) -> list[Tensor] | None:
            return denoiser.bank(references, t, context, number)

        once = None
        if sampling.reference_timestep is not None:
            once = bank(torch.tensor([sampling.reference_timestep], device=start.device))

        def eps(x: Tensor, t: Tensor) -> Tensor:
            tokens, timestep = once or bank(t), int(t[0])
            scale = sampling.guidance if timestep in range(*sampling.guided) else 1.0
            images = camera_images if timestep in range(*sampling.posed) else None
            x = x.unflatten(0, (number, count)).transpose(0, 1)  # [V, P, 4, h, w]

            def guided(views: list[int]) -> Tensor:
                size = number * len(views)
                shown = None if images is None else by_person(images[views])
                rows = by_person(x[views]), t[:size], context[:size], tokens, shown
                out = denoiser.guided(*rows, num_views=len(views), scale=scale)
                return out.unflatten(0, (number, len(views))).transpose(0, 1)

            if count <= window:
                return by_person(guided(list(range(count))))
            windows = view_windows(count, window, sampling.overlap, sampling.closed, next(steps))
            return by_person(over_windows(guided, windows, x))

        def fresh(step: int, x: Tensor) -> Tensor:
            drawn = [view_noise(person.seed, person.views, x.shape[1:], stream=step + 1) for person in people]
            return torch.cat(drawn).to(x)

        def report(step: int, *_: Tensor) -> None:
            if progress is not None:
                progress(step + 1, sampling.steps)

        if sampling.solver == "ddim":
            latents = ddim_sample(eps, start, self.schedule, sampling.steps, sampling.eta, fresh, report)
        else:
            latents = dpmpp_2m_sample(eps, start, self.schedule, sampling.steps, report)
        return latents.unflatten(0, (number, count))


def by_person(x: Tensor) -> Tensor:
    """[V, P, ...] -> [P*V, ...], a person's views in a row."""
    return x.transpose(0, 1).flatten(0, 1)


def over_windows(predict: Callable[[list[int]], Tensor], windows: Sequence[list[int]], like: Tensor) -> Tensor:
    """`predict` (views of a window -> their values) for every window; averaged where windows overlap, like [V, ...]."""
    total, weight = torch.zeros_like(like), like.new_zeros(len(like))
    for views in windows:
        own = like.new_tensor(window_weights(len(views)))  # [views of the window]
        total[views] += predict(views) * own.view(-1, *[1] * (like.ndim - 1))
        weight[views] += own
    return total / weight.view(-1, *[1] * (like.ndim - 1))
