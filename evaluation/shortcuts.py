"""Shortcuts of sampling, alone and together: what does each save, and what does it cost?

    python -m evaluation.shortcuts --weights weights/miniature [--data DIR] [--identities 40] [--views 6]
        [--rows release eight ...] [--out runs/evaluation/shortcuts.json] [--doc PAGE]

Rows are samplings of the full system, the same people from the same start noise; the first is the authors' 50 steps of
DDIM. Printed: pose, mini-LPIPS, reprojection, faces, the paired difference of the first row to the others, and the
floating-point operations of denoising one person's views, counted without computing them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from diffportrait3d.command import run_main
from diffportrait3d.pipeline import PRESETS, Person, Sampling
from training.engine.cost import SMALL, StepCounts

from .studies.command import add_weights, parse_study, run_command, study_parser
from .studies.samplings import SamplingStudy
from .tables.report import markdown_table

NOISY = (500, 1000)  # timesteps
BOTH = {"guided": NOISY, "posed": NOISY}
ROWS = {
    "release": ("DDIM, 50 steps (release)", PRESETS["release"]),
    "eight": ("DPM++ 2M, 8 steps", PRESETS["fast"]),
    "guided": ("8 steps, guidance in the noisy half", Sampling(8, guided=NOISY)),
    "middle": ("8 steps, guidance in the middle half", Sampling(8, guided=(250, 750))),
    "posed": ("8 steps, F_cam in the noisy half", Sampling(8, posed=NOISY)),
    "once": ("8 steps, F_ref once, at 0", Sampling(8, reference_timestep=0)),
    "once_middle": ("8 steps, F_ref once, at 500", Sampling(8, reference_timestep=500)),
    "eight_both": ("8 steps, guidance and F_cam in the noisy half", Sampling(8, **BOTH)),
    "faster": ("6 steps, guidance in the noisy half", PRESETS["faster"]),
    "four": ("DPM++ 2M, 4 steps", Sampling(4)),
    "four_guided": ("4 steps, guidance in the noisy half", Sampling(4, guided=NOISY)),
    "four_both": ("4 steps, guidance and F_cam in the noisy half", Sampling(4, **BOTH)),
}


class ShortcutStudy(SamplingStudy):
    """Shortcuts, with the operations of each."""

    command = "shortcuts"
    compared = ("pose", "mini_lpips", "psnr", "reprojection", "dlib_found_near", "dlib_distance_truth")

    def __init__(self, options: argparse.Namespace):
        super().__init__(options, {name: ROWS[name] for name in options.rows})

    def setting(self) -> str:
        return f"guidance {Sampling.guidance}"

    def cost_table(self, records: list[dict]) -> str:
        teraflops = {name: self.teraflops(sampling) for name, sampling in self.samplings.items()}
        most = teraflops[self.baseline]
        rows = [[self.titles[name], f"{count:.2f}", f"{most / count:.2f}"] for name, count in teraflops.items()]
        return markdown_table(["", "TFLOP per person", "times fewer"], rows)

    def teraflops(self, sampling: Sampling) -> float:
        """10^12 floating-point operations (a multiplication and an addition are two) of denoising a person's views."""
        pipeline, views = self.generator.pipeline, self.options.views
        side = pipeline.resolution // 8
        latents, images = torch.zeros(views, 4, side, side), torch.zeros(views, 3, 8 * side, 8 * side)
        with torch.no_grad(), StepCounts(SMALL) as counts:
            person = Person(latents, latents[:1], images, 0, range(views))
            pipeline.denoise([person], replace(sampling, window=views))
        return counts.flops.total() / 1e12


def main(arguments: list[str] | None = None) -> int:
    parser = study_parser("shortcuts", __doc__, "runs/evaluation/shortcuts.json", add_weights)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    return run_command(lambda options: ShortcutStudy(options).run(), parse_study(parser, arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
