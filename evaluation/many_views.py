"""Many views around a closed orbit through the real ComfyUI: memory, and whether window borders can be seen.

    python -m evaluation.many_views [--weights DIR] [--views 16 64] [--steps 6] [--only memory|borders]

Memory: the bytes of tensors that a run holds at most, weights not counted, for each number of views, with reference,
cameras, view consistency and guidance. Borders: the same views with our windows and with separate groups of the same
size (the host's own batched context windows), each view carried into its neighbour through exact depth. Lower is more
consistent; the ground truth's own error is the floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from diffportrait3d.cameras.labels import orbit_camera, trajectory
from diffportrait3d.command import run_main
from diffportrait3d.synthetic_heads import portrait_scene, render_camera_images, render_views
from diffportrait3d.views import view_windows

from .metrics.reprojection import correspondence, reprojection_error
from .tables.report import markdown_table

SUBJECT = 2_000_000  # the first held-out person of training.render
WEIGHTS = Path(__file__).resolve().parents[1] / "weights" / "miniature"
MIB = 2**20


class Orbit:
    """The miniature inside a booted host, and views of one held-out person around a closed orbit.

    Args:
        host, pack: from tools.embedded. folder: the miniature's weights.
        views: V, of the orbit.
    """

    def __init__(self, host, pack, folder: Path, views: int):
        self.host, self.pack, self.patches = host, pack, pack.patches
        loading, control = pack.host.loading, pack.patches.view_controlnet
        self.model = loading.load_model(folder / "unet.safetensors")
        self.vae = loading.load_vae(folder / "autoencoder.safetensors")
        self.encoder = loading.load_reference_encoder(folder / "reference_encoder.safetensors")
        self.module = loading.load_cross_view_attention(folder / "view_consistency.safetensors")
        self.novel_view = loading.load_novel_view(folder / "novel_view.safetensors")
        self.control_net = control.load_view_controlnet(folder / "view_controlnet.safetensors")
        self.side = self.novel_view.config.image_size
        self.labels = trajectory("orbit", views, (-30.0, 30.0), (-10.0, 10.0))
        self.scene, self.front = portrait_scene(SUBJECT), orbit_camera(0.0, 0.0)
        portrait = render_views(self.scene, self.front[None], self.side).image  # [1, 3, H, W]
        self.portrait = portrait.movedim(1, -1)

    def windows(self) -> int:
        return self.patches.cross_view_attention.trained_views(self.module)

    def latents(self) -> Tensor:
        """S's views, encoded: where 3D-aware noise starts [V, 4, h, w]."""
        proxies = self.pack.host.novel_view.render_proxies(self.novel_view, self.portrait, self.front, self.labels)
        return self.patches.noise.proxy_latents(self.vae, proxies, self.side)[0]["samples"]

    def sampling(self, latents: Tensor, conditions: Tensor, steps: int, grouped: bool = False) -> Callable[[], Tensor]:
        """A function that samples all views [V, 4, h, w], in our windows or in separate groups of the same size."""
        reference, consistency = self.patches.reference, self.patches.cross_view_attention
        images = self.patches.reference_inputs.image_references(self.vae, self.portrait)[0]
        model = reference.apply_reference_attention(self.model, self.encoder, images)
        model = consistency.apply_cross_view_attention(model, self.module, closed_orbit=True)
        if grouped:
            windows = {"context_length": self.windows(), "context_overlap": 0, "context_schedule": "batched"}
            windows |= {"context_stride": 1, "closed_loop": False, "fuse_method": "flat", "dim": 0}
            node = self.host.nodes.NODE_CLASS_MAPPINGS["ContextWindowsManual"]
            model = node.execute(model, **windows, freenoise=False, causal_window_fix=False).args[0]
        text = [[torch.zeros(1, 1, self.encoder.config.context_dim), {}]]
        positive = self.patches.view_controlnet.apply_view_controlnet(text, self.control_net, conditions)
        sampling = self.patches.sampling
        sigmas = sampling.ddim_sigmas(model.get_model_object("model_sampling"), steps)

        def run() -> Tensor:
            drawn, sampler = (self.patches.noise.ViewNoise(0), {"samples": latents}), sampling.DDIMSampler(0.5)
            return sampling.sample_views(model, positive, text, *drawn, sampler, sigmas, 3.0)["samples"]

        return run


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that tensors on the CPU take at once during `run`, above what they took before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def print_memory(host, pack, options) -> None:
    rows, first = [], None
    for views in options.views:
        orbit = Orbit(host, pack, options.weights, views)
        conditions = torch.rand(views, orbit.side, orbit.side, 3)
        latents = torch.randn(views, 4, orbit.side // 8, orbit.side // 8)
        orbit.sampling(latents[:2], conditions[:2], 1)()  # loads the networks
        peak = peak_bytes(orbit.sampling(latents, conditions, 2))
        first = first or peak
        rows.append([str(views), str(orbit.windows()), f"{peak / MIB:.1f}", f"{100 * (peak / first - 1):+.1f} %"])
    print(markdown_table(["views", "window", "peak (MiB)", f"to {rows[0][0]} views"], rows), flush=True)


def print_borders(host, pack, options) -> None:
    orbit = Orbit(host, pack, options.weights, options.views[-1])
    count, size = len(orbit.labels), orbit.windows()
    truth = render_views(orbit.scene, orbit.labels, orbit.side)
    pairs = [
        (view, (view + 1) % count, *correspondence(truth.depth, truth.mask, orbit.labels, view, (view + 1) % count))
        for view in range(count)
    ]
    conditions = render_camera_images(orbit.labels, orbit.side, SUBJECT + 1).movedim(1, -1)
    latents = orbit.latents()
    groups = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    ours = view_windows(count, size, orbit.patches.cross_view_attention.OVERLAP, True, options.steps - 1)
    variants = {
        "ground truth": (truth.image, groups),
        "separate groups": (orbit.sampling(latents, conditions, options.steps, True), groups),
        "our windows": (orbit.sampling(latents, conditions, options.steps), ours),
    }
    rows = []
    for title, (images, windows) in variants.items():
        if callable(images):
            images = orbit.vae.decode(images()).movedim(-1, 1).clamp(0, 1)  # [V, 3, H, W]
        rows.append([title, *(f"{number:.4f}" for number in border_errors(images, pairs, windows))])
    print(markdown_table(["reprojection L1 of neighbours", "inside", "at borders", "last to first"], rows), flush=True)


def border_errors(images: Tensor, pairs: list, windows: list[list[int]]) -> tuple[float, float, float]:
    """Mean error of neighbours away from the windows' ends, at the ends, and between the last and the first view.

    A pair is at a border if one of its views ends a window and the other one is outside of it.
    """
    border = set()
    for window in windows:
        for pair in pairs:
            if (pair[0] == window[-1] and pair[1] not in window) or (pair[1] == window[0] and pair[0] not in window):
                border.add(pair[0])
    inside = [pair for pair in pairs if pair[0] not in border]
    outside = [pair for pair in pairs if pair[0] in border]
    return tuple(reprojection_error(images, chosen) for chosen in (inside, outside, pairs[-1:]))


PARTS = {"memory": print_memory, "borders": print_borders}


def main(arguments: list[str] | None = None) -> int:
    from tools.embedded import temporary_host

    parser = argparse.ArgumentParser(prog="python -m evaluation.many_views", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the miniature")
    parser.add_argument("--views", type=int, nargs="+", default=[16, 64], help="borders are measured for the last")
    parser.add_argument("--steps", type=int, default=6, help="DDIM steps of the borders' views")
    parser.add_argument("--only", choices=PARTS, help="one part instead of both")
    options = parser.parse_args(arguments)
    with temporary_host() as host, torch.inference_mode():
        pack = host.load_pack()
        for part in [options.only] if options.only else PARTS:
            PARTS[part](host, pack, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
